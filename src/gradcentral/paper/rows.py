"""Weight vectors as the rows of a matrix, and their components along e."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcentral.weight_vectors import WeightVectors

__all__ = ["along_e", "as_rows", "double_rows", "relative"]


def as_rows(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Arrange the weight vectors of a tensor as rows, ``[count, fan_in]``, in the order of the output units.

    Examples:
        >>> as_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), WeightVectors(span=(0,)))
        tensor([[1, 4],
                [2, 5],
                [3, 6]])
    """
    fitted = vectors.for_shape(tensor.shape)
    last = tuple(range(-len(fitted.span), 0))
    return torch.movedim(tensor.reshape(fitted.dims), fitted.span, last).reshape(fitted.count, fitted.fan_in)


def double_rows(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """`as_rows` of the detached tensor in double precision, so that measuring adds no visible rounding."""
    return as_rows(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64)), vectors)


def along_e(rows: Tensor) -> Tensor:
    """|eᵀv| of each row v: the length of its component along e = (1, …, 1)/√M."""
    return rows.sum(1).abs() / math.sqrt(rows.shape[1])


def relative(lengths: Tensor, scale: Tensor) -> Tensor:
    """Divide lengths by a scale; where the scale is 0 (a dead unit), return the length itself."""
    return lengths / torch.where(scale > 0, scale, 1)
