"""`GradientCentralization`: a Lightning callback that attaches GC to the optimizers of a ``Trainer`` while it fits."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.attach import Handle
from gradcentral.diagnostics.monitor import Monitor
from gradcentral.integrations.settings import checked_settings, refuse_own_optimizers
from gradcentral.layout import WeightLayout

__all__ = ["GradientCentralization"]


def _callback_classes() -> Iterator[type]:
    """Yield ``Callback`` of each of the two packages of Lightning, ``lightning`` and ``pytorch_lightning``.

    Their classes are unrelated, and pip installs both with ``lightning``. A subclass of both works in the ``Trainer``
    and the ``LightningCLI`` of either one.
    """
    for module in ("lightning.pytorch", "pytorch_lightning"):
        try:
            yield importlib.import_module(module).Callback
        except ModuleNotFoundError as error:
            if error.name not in (module, module.partition(".")[0]):
                raise


_CALLBACKS = tuple(_callback_classes())
if not _CALLBACKS:
    raise ModuleNotFoundError("Lightning is not installed: pip install lightning")
_Callback: Any = types.new_class("_Callback", _CALLBACKS)


class GradientCentralization(_Callback):  # type: ignore[misc]
    """Center the gradients of all optimizers of a ``Trainer``: ``Trainer(callbacks=[GradientCentralization()])``.

    It attaches when training starts, to the optimizers of ``configure_optimizers``, as `gradcentral.centralize` does,
    and detaches when ``fit`` ends or raises. Optimizers that replace them while training are attached to before their
    first batch. Lightning clips before it calls ``step()``, so clipping comes first and
    centering second, with automatic and with manual optimization. Parameters that have no weight vectors, and
    optimizers that hold no others, are left as they are.

    Args:
        placement: ``"gradient"``, ``"regularized"`` or ``"update"``, see `gradcentral.centralize`. None attaches
            nothing and only monitors, for optimizers of gradcentral, which center by themselves, and for training
            without GC.
        strength: from 0 (off) to 1 (GC). It may change while training, as ``callback.handle.strength``.
        only: ``"all"``, or ``"conv"`` for convolutions alone; see `gradcentral.weight_layout`, also for the next two.
        overrides: {name of a parameter: pattern such as ``"[i] o"``, or None to skip it}.
        exclude: names of parameters to skip, with wildcards.
        submodule: name of the part of the LightningModule to center, such as ``"generator"``. Names of parameters are
            then relative to it. Give one callback per part for different settings, as in a GAN.
        monitor: steps per record of a `gradcentral.Monitor`, which is sent to all loggers of the ``Trainer``. None:
            no monitor. With several optimizers, each has a monitor, named ``optimizer0``, ``optimizer1``, ….

    Attributes:
        handle: what is attached, a `gradcentral.Handle`; None before training and with ``placement=None``.
        monitors: one `gradcentral.Monitor` per optimizer; their records remain after training. Replaced optimizers get
            new monitors, which continue the steps and the drift.

    Checkpoints contain the state of the monitors, so that a resumed run continues their steps and their drift.

    Raises:
        ValueError: an unknown placement or ``only``; a strength that is not between 0 and 1; a ``monitor`` that is not
            a number of steps; ``placement=None`` without ``monitor``, or with a strength. When training starts: the
            module has no optimizers, or is without the submodule, or an optimizer is one of gradcentral's; and the
            errors of `gradcentral.centralize`, `gradcentral.weight_layout` and `gradcentral.Monitor`.

    Examples:
        >>> GradientCentralization("update", exclude=["head.*"], monitor=100)
        GradientCentralization(placement='update', exclude=['head.*'], monitor=100)
    """

    def __init__(
        self,
        placement: Literal["gradient", "regularized", "update"] | None = "gradient",
        strength: float = 1.0,
        *,
        only: Literal["all", "conv"] = "all",
        overrides: Mapping[str, str | None] | None = None,
        exclude: Sequence[str] = (),
        submodule: str | None = None,
        monitor: int | None = None,
    ) -> None:
        self._settings = checked_settings(placement, strength, only, overrides, exclude, monitor)
        self._submodule = submodule
        self.handle: Handle | None = None
        self.monitors: list[Monitor] = []
        self._remove_handle = False
        self._states: dict[str, Any] = {}
        self._trained: list[Optimizer] = []  # the Trainer's optimizers that were attached to

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints; it differs between callbacks for different submodules."""
        return "GradientCentralization" + ("" if self._submodule is None else f"[{self._submodule}]")

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Forget the states that an earlier run has loaded; those of this run are loaded after this hook."""
        self._states = {}

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach to the optimizers, and start the monitors."""
        self._detach()
        self.handle, self.monitors = None, []
        model = self._model(pl_module)
        layout = self._settings.layout(model)
        optimizers = self._optimizers(trainer, layout)
        if self._settings.placement is not None:
            refuse_own_optimizers(optimizers)
        # If configure_optimizers has attached the same, that stays attached after training.
        self.handle, self._remove_handle = self._settings.attach(optimizers, layout)
        self._trained = [*trainer.optimizers]
        if self._settings.monitor is not None:
            self._start_monitors(trainer, model, optimizers, layout, self._settings.monitor)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Attach to optimizers that have replaced those of the beginning, unless the handle has been removed."""
        before = self.handle
        if trainer.optimizers == self._trained or (before is not None and before._removed):
            return
        self._states = self.state_dict()
        self.on_train_start(trainer, pl_module)
        if before is not None and self.handle is not None:
            self.handle.strength = before.strength
            if before._paused:
                self.handle.pause()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Detach, since the optimizers may be used after an exception."""
        self._detach()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Detach when ``fit`` ends."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the monitors."""
        return {monitor.name or "": monitor.state_dict() for monitor in self.monitors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states of the monitors until they are created."""
        self._states = state_dict

    def _model(self, pl_module: nn.Module) -> nn.Module:
        if self._submodule is None:
            return pl_module
        try:
            return pl_module.get_submodule(self._submodule)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"submodule: {type(pl_module).__name__} has no {self._submodule!r}; choose from {names}"
            ) from None

    def _optimizers(self, trainer: Any, layout: WeightLayout) -> list[Optimizer]:
        # Without any, Lightning puts an optimizer of one zero in their place.
        optimizers = [one for one in trainer.optimizers if type(one).__name__ != "_MockOptimizer"]
        if not optimizers:
            raise ValueError(
                "the LightningModule has no optimizers: return one from configure_optimizers, or leave "
                "GradientCentralization out"
            )
        if self._submodule is None:
            return optimizers
        held = [one for one in optimizers if any(layout.in_model(p) for p in _parameters(one))]
        if not held:
            raise ValueError(
                f"submodule: no optimizer of the LightningModule holds a parameter of {self._submodule!r}; return one "
                "that does from configure_optimizers"
            )
        return held

    def _start_monitors(
        self, trainer: Any, model: nn.Module, optimizers: list[Optimizer], layout: WeightLayout, every: int
    ) -> None:
        # Loggers are disabled in a fast development run. With several processes, the first one logs.
        to = trainer.loggers if trainer.is_global_zero and not trainer.fast_dev_run else []
        several = len(optimizers) > 1
        # Some of several optimizers may center nothing. If none centers anything, the monitor's error tells why.
        centering = [one for one in optimizers if _centers(one, layout)] or optimizers
        for optimizer in centering:
            number = f"optimizer{optimizers.index(optimizer)}" if several else None
            name = "/".join(part for part in (self._submodule, number) if part) or None
            monitor = Monitor(
                model,
                optimizer,
                every=every,
                to=to,
                layout=self._settings.layout_to_monitor(layout),
                name=name,
                # Lightning counts the steps of all optimizers.
                step=trainer.global_step // len(trainer.optimizers),
            )
            if (state := self._states.get(name or "")) is not None:
                monitor.load_state_dict(state)
            self.monitors.append(monitor)

    def _detach(self) -> None:
        if self.handle is not None and self._remove_handle:
            self.handle.remove()
        for monitor in self.monitors:
            monitor.remove()
        self._trained = []

    def __repr__(self) -> str:
        part = "" if self._submodule is None else f", submodule={self._submodule!r}"
        return f"{type(self).__name__}({self._settings}{part})"


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _centers(optimizer: Optimizer, layout: WeightLayout) -> bool:
    groups = [group["params"] for group in optimizer.param_groups if group.get("centralize", True)]
    return any(p in layout for group in groups for p in group)
