"""Hugging Face's Trainer: a callback that attaches Gradient Centralization when training begins."""

from __future__ import annotations

import base64
import gc
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler, ExportableState

from gradcentral.attach import Handle
from gradcentral.diagnostics.monitor import Monitor
from gradcentral.diagnostics.record import Record
from gradcentral.integrations.settings import checked_settings, refuse_own_optimizers
from gradcentral.layout import WeightLayout

__all__ = ["GradientCentralization"]


class GradientCentralization(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Center the gradients of a ``transformers.Trainer``, whatever its model and its optimizer.

    Pass it as ``Trainer(callbacks=[GradientCentralization()])``. Each ``train()`` attaches to the optimizer after
    accelerate has prepared it, and detaches at its end. The Trainer clips before ``optimizer.step()``: first it clips,
    then GC centers.

    Args:
        placement: ``"gradient"``, ``"regularized"`` or ``"update"``, see `gradcentral.centralize`. None attaches
            nothing and only monitors, for optimizers of gradcentral, which center by themselves, and for training
            without GC.
        strength: from 0 (off) to 1 (GC). It may change while training, as ``callback.handle.strength``.
        only, overrides, exclude: options of `gradcentral.weight_layout`. Names and patterns must be text, since they
            are saved in checkpoints.
        monitor: steps per record of a `gradcentral.Monitor`; without it, there is no monitor. Its records go to the
            loggers of ``report_to``, as ``record.scalars()``, but neither to the console nor to ``log_history``.
            Checkpoints contain its state.

    Attributes:
        handle: the `gradcentral.Handle` during training; None with ``placement=None``.
        monitor: the `gradcentral.Monitor` of the current or last training.

    Raises:
        ValueError: an unknown placement or ``only``; a strength that is not between 0 and 1; a ``monitor`` that is not
            a number of steps; ``placement=None`` without ``monitor``, or with a strength. When training begins: the
            optimizer is one of gradcentral's, or that of DeepSpeed's ZeRO of stage 1 to 3; another callback of this
            class has a monitor too; and the errors of `gradcentral.centralize`, `gradcentral.weight_layout` and
            `gradcentral.Monitor`.
        TypeError: overrides or exclude contain anything but text.

    Examples:
        >>> GradientCentralization(placement="update", monitor=100)
        GradientCentralization(placement='update', monitor=100)
    """

    def __init__(
        self,
        placement: Literal["gradient", "regularized", "update"] | None = "gradient",
        strength: float = 1.0,
        *,
        only: Literal["all", "conv"] = "all",
        overrides: Mapping[str, str | None] | None = None,
        exclude: Iterable[str] = (),
        monitor: int | None = None,
    ) -> None:
        self._settings = checked_settings(placement, float(strength), only, overrides, exclude, monitor)
        self.handle: Handle | None = None
        self.monitor: Monitor | None = None
        self._attached = False  # whether this callback has attached the handle, and so removes it
        try:
            json.dumps(self.state())
        except TypeError as error:
            raise TypeError(
                "overrides and exclude must consist of text (names, wildcards, patterns), because checkpoints contain "
                f"them as JSON ({error}); for other rules use gradcentral.register_layout"
            ) from error

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the prepared optimizer."""
        self._detach()  # in case an exception ended the previous training
        layout = self._attach(model, optimizer)
        saved = self._saved_in(state)
        if self._settings.monitor is not None:
            event = (args, state, control)
            try:
                self._start_monitor(self._settings.monitor, saved, event, model, optimizer, layout)
            except Exception:
                self._detach()
                raise

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, so that a later training can attach again."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """Return the arguments and the monitor's state, which transformers saves in ``trainer_state.json``."""
        saved = None if self.monitor is None else _to_text(self.monitor.state_dict())
        return {"args": {**vars(self._settings)}, "attributes": {}, "monitor": saved}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings})"

    def _attach(self, model: nn.Module, optimizer: Any) -> WeightLayout:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if isinstance(optimizer, DeepSpeedOptimizerWrapper) and held.isdisjoint(model.parameters()):
            raise ValueError(
                "DeepSpeed's ZeRO has flattened the parameters, so that this callback cannot center them: call "
                "gradcentral.centralize_in_backward(model) before trainer.train() instead"
            )
        if self._settings.placement is not None:
            refuse_own_optimizers([optimizer])
        layout = self._settings.layout(model)
        self.handle, self._attached = self._settings.attach([optimizer], layout)
        return layout

    def _start_monitor(
        self, every: int, saved: Any, event: tuple[Any, ...], model: nn.Module, optimizer: Any, layout: WeightLayout
    ) -> None:
        """Attach a monitor that continues from a checkpoint, if the training does."""
        beside = _callbacks_beside(self, model)
        others = [one for one in beside if isinstance(one, type(self)) and one is not self]
        if any(one._settings.monitor is not None for one in others):
            raise ValueError(
                "monitor: another GradientCentralization of this Trainer has one too, and it records everything that "
                "is centered in the optimizer; leave monitor= out of all but one of them"
            )
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        loggers: list[Any] = [one for one in beside if isinstance(one, kinds)]

        def log(record: Record) -> None:
            for logger in loggers:
                logger.on_log(*event, logs=record.scalars(), model=model, optimizer=optimizer)

        step = event[1].global_step
        to_monitor = self._settings.layout_to_monitor(layout)
        self.monitor = Monitor(model, optimizer, every=every, to=log, layout=to_monitor, step=step)
        if step and saved is not None and saved["monitor"]:
            self.monitor.load_state_dict(_from_text(saved["monitor"]))

    def _saved_in(self, state: Any) -> Any:
        """Return what this callback has saved in a checkpoint; None if it was not there yet."""
        # transformers looks this entry up when it saves, but a checkpoint from before the callback was added lacks it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):  # of several callbacks of this class; transformers appends to it in each checkpoint
            arguments = self.state()["args"]
            return next((one for one in reversed(saved) if one["args"] == arguments), None)
        return saved

    def _detach(self) -> None:
        if self.handle is not None and self._attached:
            self.handle.remove()
        if self.monitor is not None:
            self.monitor.remove()
        self.handle = None


def _callbacks_beside(callback: TrainerCallback, model: nn.Module) -> list[Any]:
    """Return all callbacks of the Trainer that trains the model.

    transformers does not pass the Trainer to callbacks, and those of ``report_to`` precede a user's callbacks, so a
    user's ``on_log`` can add nothing to what they log. So the Trainer's list is searched among the objects of the
    process, once per training.
    """
    # Unlike isinstance, issubclass does not access __class__, which runs code in proxies and mocks.
    handlers = (found for found in gc.get_objects() if issubclass(type(found), CallbackHandler))
    lists = (found.callbacks for found in handlers if found.model is model)
    return next((list(found) for found in lists if any(each is callback for each in found)), [])


def _to_text(state: dict[str, Any]) -> str:
    """Encode a monitor's state as text: 11 characters per weight vector, 430 per parameter."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_text(text: str) -> Any:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
