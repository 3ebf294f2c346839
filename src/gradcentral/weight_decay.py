"""L2 weight decay of an optimizer's parameters: the λ of placement "regularized"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["L2", "l2_of", "l2_of_group"]

_L2_NAMES = ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")
_DECOUPLED_NAMES = ("AdamW", "Adafactor", "Muon")  # Muon is missing from older versions of torch


def _classes(names: tuple[str, ...]) -> tuple[type[Optimizer], ...]:
    return tuple(getattr(torch.optim, name) for name in names if hasattr(torch.optim, name))


_ADD_TO_GRADIENT, _DECOUPLED = _classes(_L2_NAMES), _classes(_DECOUPLED_NAMES)


class L2(NamedTuple):
    """The weight decay that a step adds to ``p.grad``, in the units of ``p.grad``."""

    factors: dict[Tensor, float]
    """λ of each parameter whose λ is not 0; negative if the optimizer maximizes, and so negates ``p.grad``."""
    grad_scale: Tensor | None
    """The scale of ``p.grad``, if the optimizer itself divides by a GradScaler's scale."""

    def of(self, parameter: Tensor) -> float | Tensor:
        """Return the factor of the weights in g + λw, where g is ``p.grad``."""
        factor = self.factors.get(parameter, 0.0)
        return factor if factor == 0 or self.grad_scale is None else self.grad_scale * factor


def l2_of(optimizer: Optimizer) -> L2:
    """Return the L2 weight decay of all parameters of an optimizer.

    Raises:
        ValueError: as `l2_of_group`.
    """
    factors: dict[Tensor, float] = {}
    for group in optimizer.param_groups:
        if (factor := l2_of_group(optimizer, group)) != 0:
            factors.update(dict.fromkeys(group["params"], -factor if group.get("maximize", False) else factor))
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None and scale.device.type != "mps":  # MPS has no float64
        scale = scale.double()
    return L2(factors, scale)


def l2_of_group(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return λ if the optimizer adds λw to the gradients of a group, and 0 if its weight decay is decoupled or 0.

    Raises:
        ValueError: the class is not one of torch.optim, nor derived from one, and it has weight decay of unknown kind.
    """
    decay = float(group.get("weight_decay", 0.0))
    if decay == 0 or group.get("decoupled_weight_decay", isinstance(optimizer, _DECOUPLED)):
        return 0.0
    if not isinstance(optimizer, _ADD_TO_GRADIENT):
        raise ValueError(
            f"placement 'regularized' needs L2 weight decay, and whether that of {type(optimizer).__name__} is L2 or "
            "decoupled is unknown: use placement='update', which centers either, or placement='gradient'"
        )
    return decay
