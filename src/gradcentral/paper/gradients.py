"""The gradients of a batch, and weight vectors as the rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Batch", "Loss", "along_e", "as_rows", "centered_layout", "double_rows", "gradients_of"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]  # loss(output, target) -> scalar
Batch: TypeAlias = "tuple[Any, Any] | Mapping[str, Any]"  # a mapping is used as model(**batch) and loss(output, batch)


def gradients_of(model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout) -> dict[Tensor, Tensor]:
    """Compute the gradient of each trainable, centered parameter, without changing the model."""
    trained = [w for w in layout if w.requires_grad]
    if not trained:
        raise ValueError("layout: none of the parameters that it centers requires a gradient")
    with preserve_state(model), torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(model, loss, batch), trained, materialize_grads=True)
    return dict(zip(trained, gradients, strict=True))


def centered_layout(model: nn.Module, layout: WeightLayout | None) -> WeightLayout:
    """Return the layout, by default ``weight_layout(model)``; it must center something."""
    layout = weight_layout(model) if layout is None else layout
    if not layout:
        raise ValueError(f"nothing is centered: {layout.summary()}\n{layout.to_paste()}".rstrip())
    return layout


def as_rows(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Arrange the weight vectors of a tensor as rows, ``[count, fan_in]``, in the order of the output units."""
    fitted = vectors.for_shape(tensor.shape)
    last = tuple(range(-len(fitted.span), 0))
    return torch.movedim(tensor.reshape(fitted.dims), fitted.span, last).reshape(fitted.count, fitted.fan_in)


def double_rows(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Apply `as_rows` to the detached tensor in double precision, so that rounding errors are negligible."""
    return as_rows(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64)), vectors)


def along_e(rows: Tensor) -> Tensor:
    """Compute |eᵀv| of each row v: the length of its component along e = (1, …, 1)/√M."""
    return rows.sum(1).abs() / math.sqrt(rows.shape[1])
