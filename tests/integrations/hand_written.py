"""Gradient Centralization written by hand for plain layers, a small network, and loops that trainers must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

__all__ = [
    "Batch",
    "adamw",
    "batches",
    "center_by_hand",
    "data",
    "difference",
    "largest_mean",
    "network",
    "sgd",
    "train",
    "values_of",
    "weights_of",
]

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Return a small CNN, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def data() -> Batch:
    """Return 64 images and their classes; the pixels are positive, so that gradients have large means."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(64, 1, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def batches(size: int = 8) -> list[Batch]:
    """Return the data in order, in batches."""
    images, classes = data()
    return list(zip(images.split(size), classes.split(size), strict=True))


def sgd(parameters: Any) -> Optimizer:
    """Create SGD with momentum and weight decay."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> Optimizer:
    """Create AdamW."""
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def train(
    model: nn.Module,
    loader: Sequence[Batch],
    optimizer: Callable[[Any], Optimizer] | None = None,
    placement: str | None = "gradient",
    *,
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    accumulate: int = 1,
    clip: float | None = None,
    clip_first: bool = True,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Train a model with GC by hand, and return it.

    Args:
        model: its Conv2d and Linear weights are centered, over all axes but the first.
        loader: the batches.
        optimizer: creates the optimizer from the parameters; by default SGD with a learning rate of 0.1.
        placement: None for no GC.
        loss: of the model and a batch.
        accumulate: batches per step.
        clip: largest gradient norm.
        clip_first: whether clipping comes before centering.
        weight_decay: L2 weight decay of the optimizer, for placement "regularized".
    """
    made = (optimizer or (lambda parameters: SGD(parameters, lr=0.1)))(model.parameters())
    weights = weights_of(model)
    for number, batch in enumerate(loader, start=1):
        (loss(model, batch) / accumulate).backward()
        if number % accumulate:
            continue
        if clip is not None and clip_first:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            if placement in ("gradient", "regularized"):
                assert weight.grad is not None
                decay = weight_decay * weight.detach() if placement == "regularized" else 0.0
                weight.grad = _centered(weight.grad + decay) - decay
        if clip is not None and not clip_first:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        if placement == "update":
            with torch.no_grad():
                for weight, start in zip(weights, before, strict=True):
                    weight.copy_(start + _centered(weight - start))
        made.zero_grad()
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    """Return the weights of the Linear and Conv2d layers, whose weight vectors are the rows."""
    return [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def center_by_hand(model: nn.Module) -> None:
    """Subtract the mean of each row from the gradients of the Linear and Conv2d layers."""
    for weight in weights_of(model):
        if weight.grad is not None:
            # Not copy_, which would cut the graph of the gradient, from which AdaHessian takes second derivatives.
            weight.grad -= weight.grad.mean(tuple(range(1, weight.ndim)), keepdim=True)


def largest_mean(tensors: Iterable[Tensor]) -> float:
    """Return the largest absolute mean of a row, relative to the largest element of its tensor."""
    return max(float(t.detach().flatten(1).mean(1).abs().max() / t.detach().abs().max()) for t in tensors)


def values_of(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters' values."""
    return [p.detach().clone() for p in model.parameters()]


def difference(one: nn.Module | Iterable[Tensor], other: nn.Module | Iterable[Tensor]) -> float:
    """Return the largest absolute difference between two lists of tensors or the parameters of two models."""
    lists = [each.parameters() if isinstance(each, nn.Module) else each for each in (one, other)]
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(*lists, strict=True))


def _centered(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean(dim=tuple(range(1, tensor.ndim)), keepdim=True)
