"""The settings that the callbacks for trainers share: checked when a callback is created, used when training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcentral.attach import Handle, attached, centralize
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.layout.layout import check_only
from gradcentral.optim.base import CentralizedOptimizer
from gradcentral.projection import checked_strength
from gradcentral.step_hooks import hooked_optimizer
from gradcentral.targets import check_placement

__all__ = ["Settings", "checked_settings", "refuse_own_optimizers"]


@dataclass(frozen=True)
class Settings:
    """What to center and how; see `gradcentral.centralize` and `gradcentral.weight_layout`.

    Attributes:
        placement: None to attach nothing and only monitor.
        monitor: steps per record of a `gradcentral.Monitor`; None for no monitor.
    """

    placement: str | None
    strength: float
    only: str
    overrides: dict[Any, str | None]
    exclude: list[Any]
    monitor: int | None

    def layout(self, model: nn.Module) -> WeightLayout:
        """Return the layout of a model."""
        return weight_layout(model, only=self.only, overrides=self.overrides, exclude=self.exclude)

    def layout_to_monitor(self, layout: WeightLayout) -> WeightLayout | None:
        """Return the layout for a `gradcentral.Monitor`; None to use that of what centers in the optimizer."""
        chosen = self.only != "all" or self.overrides or self.exclude
        return layout if self.placement is None and chosen else None

    def attach(self, optimizers: Sequence[Optimizer], layout: WeightLayout) -> tuple[Handle | None, bool]:
        """Attach to optimizers.

        Returns:
            The handle, and whether this call has attached it. It has not if the same had been attached before.
        """
        if self.placement is None:
            return None, False
        present = [handle for optimizer in optimizers for handle in attached(optimizer)]
        handle = centralize(optimizers, placement=self.placement, layout=layout, strength=self.strength)
        return handle, handle not in present

    def __str__(self) -> str:
        """Return the arguments as they are typed, without those that have their default values."""
        defaults = {"strength": 1.0, "only": "all", "overrides": {}, "exclude": [], "monitor": None}
        given = {name: value for name, value in vars(self).items() if name == "placement" or value != defaults[name]}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


def checked_settings(
    placement: str | None,
    strength: float,
    only: str,
    overrides: Mapping[Any, str | None] | None,
    exclude: Iterable[Any],
    monitor: int | None,
) -> Settings:
    """Check what can be checked before there is a model.

    Raises:
        ValueError: an unknown placement or ``only``; a strength that is not between 0 and 1; a ``monitor`` that is not
            a number of steps; ``placement=None`` without ``monitor``, or with a strength.
    """
    if monitor is not None and (isinstance(monitor, bool) or not isinstance(monitor, int) or monitor < 1):
        raise ValueError(f"monitor must be the number of steps per record, such as monitor=100, not {monitor!r}")
    if placement is not None:
        check_placement(placement)
    elif monitor is None:
        raise ValueError(
            "placement=None attaches nothing: give monitor=100 to record what the optimizers do, or a placement"
        )
    elif strength != 1:
        raise ValueError("strength: has no effect with placement=None, which attaches nothing; leave it out")
    checked_strength(strength)
    check_only(only)
    exclude = [exclude] if isinstance(exclude, str) else [*exclude]
    return Settings(placement, strength, only, dict(overrides or {}), exclude, monitor)


def refuse_own_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers of gradcentral, which center by themselves, with a remedy for callbacks that can monitor.

    Raises:
        ValueError: one of them is.
    """
    for optimizer in map(hooked_optimizer, optimizers):
        if isinstance(optimizer, CentralizedOptimizer):
            raise ValueError(
                f"gradcentral.{type(optimizer).__name__} already centers: leave GradientCentralization out, or "
                "record what the optimizer does, with GradientCentralization(placement=None, monitor=100)"
            )
