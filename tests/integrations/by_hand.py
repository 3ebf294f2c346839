"""Gradient Centralization written by hand for plain layers, and what tests compare with it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def weights_of(model: nn.Module) -> list[Tensor]:
    """Return the weights of the Linear and Conv2d layers, whose weight vectors are the rows."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def center_by_hand(model: nn.Module) -> None:
    """Subtract the mean of each row from the gradients of the Linear and Conv2d layers."""
    for weight in weights_of(model):
        if weight.grad is not None:
            weight.grad -= weight.grad.mean(tuple(range(1, weight.ndim)), keepdim=True)


def largest_mean(tensors: Iterable[Tensor]) -> float:
    """Return the largest absolute mean of a row, relative to the largest element of its tensor."""
    return max(float(t.detach().flatten(1).mean(1).abs().max() / t.detach().abs().max()) for t in tensors)


def values_of(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters' values."""
    return [p.detach().clone() for p in model.parameters()]


def difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Return the largest absolute difference between two lists of tensors."""
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(one, other, strict=True))
