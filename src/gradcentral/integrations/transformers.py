"""Hugging Face's Trainer: a callback that attaches Gradient Centralization when training begins."""

from __future__ import annotations

import base64
import gc
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler, ExportableState

from gradcentral.attach import Handle, attached, centralize
from gradcentral.diagnostics.monitor import Monitor
from gradcentral.diagnostics.record import Record
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.optim.base import CentralizedOptimizer
from gradcentral.projection import checked_strength
from gradcentral.step_hooks import hooked_optimizer
from gradcentral.targets import check_placement

__all__ = ["GradientCentralization"]


class GradientCentralization(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Center the gradients of a ``transformers.Trainer``, whatever its model and its optimizer.

    Pass it as ``Trainer(callbacks=[GradientCentralization()])``. Each ``train()`` attaches to the optimizer after
    accelerate has prepared it, and detaches at its end. The Trainer clips before ``optimizer.step()``: first it clips,
    then GC centers.

    Args:
        placement, strength: see `gradcentral.centralize`.
        only, overrides, exclude: options of `gradcentral.weight_layout`. Names and patterns must be text, since they
            are saved in checkpoints.
        monitor: steps per record of a `gradcentral.Monitor`; without it, there is no monitor. Its records go to the
            loggers of ``report_to``, as ``record.scalars()``, but neither to the console nor to ``log_history``.
            Checkpoints contain its state.

    Attributes:
        handle: the `gradcentral.Handle` during training; None for gradcentral's own optimizers, which center by
            themselves and must have the same settings as the callback.
        monitor: the `gradcentral.Monitor` of the current or last training.

    Raises:
        ValueError: an unknown placement; a strength that is not between 0 and 1; when training begins, the errors of
            `gradcentral.centralize`, `gradcentral.weight_layout` and `gradcentral.Monitor`, an optimizer of
            gradcentral with other settings, or DeepSpeed's ZeRO of stage 1 to 3.
        TypeError: overrides or exclude contain anything but text.

    Examples:
        >>> GradientCentralization(placement="update", monitor=100)
        GradientCentralization(placement='update', strength=1.0, only='all', monitor=100)
    """

    def __init__(
        self,
        placement: str = "gradient",
        strength: float = 1.0,
        *,
        only: str = "all",
        overrides: Mapping[str, str | None] | None = None,
        exclude: Iterable[str] = (),
        monitor: int | None = None,
    ) -> None:
        check_placement(placement)
        checked_strength(strength)
        self.placement, self.strength, self.every = placement, float(strength), monitor
        self.handle: Handle | None = None
        self.monitor: Monitor | None = None
        self._attached = False  # whether this callback has attached the handle, and so removes it
        exclude = [exclude] if isinstance(exclude, str) else [*exclude]
        self._layout_options: dict[str, Any] = {"only": only, "overrides": dict(overrides or {}), "exclude": exclude}
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
        self._attach(model, optimizer)
        # transformers looks this entry up when it saves, but a checkpoint from before the callback was added lacks it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self.every is not None:
            self._monitor(self.every, saved, (args, state, control), model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, so that a later training can attach again."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """Return the arguments and the monitor's state, which transformers saves in ``trainer_state.json``."""
        arguments = {"placement": self.placement, "strength": self.strength, **self._layout_options}
        saved = None if self.monitor is None else _to_text(self.monitor.state_dict())
        return {"args": {**arguments, "monitor": self.every}, "attributes": {}, "monitor": saved}

    def __repr__(self) -> str:
        arguments = {name: value for name, value in self.state()["args"].items() if value not in (None, [], {})}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    def _attach(self, model: nn.Module, optimizer: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if isinstance(optimizer, DeepSpeedOptimizerWrapper) and held.isdisjoint(model.parameters()):
            raise ValueError(
                "DeepSpeed's ZeRO has flattened the parameters, so that this callback cannot center them: call "
                "gradcentral.centralize_in_backward(model) before trainer.train() instead"
            )
        layout = weight_layout(model, **self._layout_options)
        inner = hooked_optimizer(optimizer)
        if isinstance(inner, CentralizedOptimizer):
            self._check_same_settings(inner, layout)
            return
        existing = attached(inner)
        handle = centralize(optimizer, layout=layout, placement=self.placement, strength=self.strength)
        self.handle, self._attached = handle, handle not in existing

    def _monitor(self, every: int, saved: Any, event: tuple[Any, ...], model: nn.Module, optimizer: Any) -> None:
        """Attach a monitor that continues from a checkpoint, if the training does."""
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        loggers: list[Any] = [each for each in _callbacks_beside(self, model) if isinstance(each, kinds)]

        def log(record: Record) -> None:
            for logger in loggers:
                logger.on_log(*event, logs=record.scalars(), model=model, optimizer=optimizer)

        step = event[1].global_step
        self.monitor = Monitor(model, optimizer, every=every, to=log, step=step)
        if step and isinstance(saved, dict) and saved.get("monitor"):
            self.monitor.load_state_dict(_from_text(saved["monitor"]))

    def _check_same_settings(self, optimizer: CentralizedOptimizer, layout: WeightLayout) -> None:
        """Refuse settings that differ from those of an optimizer that centers by itself."""
        optimizer.layout.refresh()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        same = (optimizer.placement, optimizer.strength) == (self.placement, self.strength)
        if not same or any(optimizer.layout.get(p) != layout.get(p) for p in held):
            name = f"gradcentral.{type(optimizer).__name__}"
            raise ValueError(
                f"{name} centers by itself, with other settings (placement {optimizer.placement!r}, strength "
                f"{optimizer.strength}) than {self!r}: pass the same settings to both, or leave this callback out"
            )

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
