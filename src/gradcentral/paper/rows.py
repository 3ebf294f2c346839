"""The weight vectors of a parameter as the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcentral.weight_vectors import WeightVectors

__all__ = ["as_rows"]


def as_rows(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """A tensor's weight vectors as rows, ``[count, fan_in]``, in the order of the output units.

    Raises:
        ValueError: ``vectors`` does not fit the tensor's shape.

    Examples:
        >>> import torch
        >>> from gradcentral import WeightVectors
        >>> as_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), WeightVectors(span=(0,)))
        tensor([[1, 4],
                [2, 5],
                [3, 6]])
    """
    fitted = vectors.for_shape(tensor.shape)
    last = tuple(range(-len(fitted.span), 0))
    rows: Tensor = torch.movedim(tensor.reshape(fitted.dims), fitted.span, last).reshape(fitted.count, fitted.fan_in)
    return rows
