"""Gradient centralization on one tensor: the reference that every faster path is tested equal to.

Φ(g) = g − mean(g) = P g,  P = I − e eᵀ,  e = (1, …, 1)/√M,  M = fan-in   (Yong et al. 2020, eq. 1 and 2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcentral.weight_vectors import WeightVectors

__all__ = ["Pair", "center", "center_", "projection_matrix", "share", "unit_means"]

Pair = tuple[Tensor, WeightVectors]
"""A tensor and the weight vectors in it."""

# Sums of a thousand half-precision numbers lose the mean; f32 holds it.
_ACCUMULATE_IN = {torch.complex32: torch.complex64}


def center(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Φ(g): the tensor with the mean of each of its weight vectors removed. Pure and differentiable.

    Args:
        tensor: any floating or complex dtype, any strides. Types narrower than 32 bits are averaged in f32 and
            rounded once.
        vectors: which elements make one weight vector.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError: the tensor is not floating or complex.
        ValueError: the tensor is sparse, or ``vectors`` does not fit its shape.

    Source: Yong et al. 2020, eq. 1.

    Examples:
        >>> import torch
        >>> from gradcentral import WeightVectors, center
        >>> center(torch.tensor([[1.0, 2.0, 6.0]]), WeightVectors(span=(1,)))
        tensor([[-2., -1.,  3.]])
    """
    _check(tensor)
    g = _wide(tensor)
    view, span = _view(g, vectors)
    return (view - view.mean(span, keepdim=True)).reshape(tensor.shape).to(tensor.dtype)


def center_(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """`center` in place: the tensor keeps its storage, its strides and its identity.

    Raises:
        TypeError, ValueError: as `center`.
        RuntimeError: several elements share memory (an expanded tensor), as for every in-place operation of torch.
    """
    return subtract_means_(tensor, unit_means(tensor, vectors), vectors)


def unit_means(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Mean of each weight vector, with the spanned axes of the view kept at size 1, at least in f32."""
    _check(tensor)
    view, span = _view(_wide(tensor), vectors)
    return view.mean(span, keepdim=True)


def subtract_means_(tensor: Tensor, means: Tensor, vectors: WeightVectors) -> Tensor:
    """Subtract one number per weight vector (as `unit_means` returns them) in place, rounding once."""
    dims = vectors.for_shape(tensor.shape).dims
    if vectors.view is None:
        return tensor.sub_(means)
    try:
        tensor.view(dims).sub_(means)
    except RuntimeError:  # the strides do not allow this view
        tensor.sub_(means.expand(dims).reshape(tensor.shape))
    return tensor


def share(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Part of the tensor's energy that centering removes: 1 − ‖Φ(g)‖²/‖g‖² = ‖eᵀg‖²/‖g‖², between 0 and 1.

    Returns:
        A real scalar tensor; 0 where the tensor is all zero (nothing is removed), NaN where it is not finite.

    Raises:
        TypeError, ValueError: as `center`.

    Source: ‖Φ(g)‖² = ‖g‖² − ‖eᵀg‖², Yong et al. 2020, theorem 4.2.

    Examples:
        >>> import torch
        >>> from gradcentral import WeightVectors, share
        >>> share(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), WeightVectors(span=(1,)))
        tensor(0.5000)
    """
    means = unit_means(tensor, vectors)
    fan_in = vectors.for_shape(tensor.shape).fan_in
    total = _wide(tensor).abs().square().sum()
    removed = fan_in * means.abs().square().sum()
    return torch.where(total == 0, 0.0, removed / torch.where(total == 0, 1, total))


def projection_matrix(
    fan_in: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """P = I − e eᵀ as a matrix of shape (fan_in, fan_in): for teaching and for tests.

    Raises:
        ValueError: fan_in < 1.

    Source: Yong et al. 2020, eq. 2.

    Examples:
        >>> from gradcentral import projection_matrix
        >>> projection_matrix(2)
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    if fan_in < 1:
        raise ValueError(f"fan_in must be at least 1, not {fan_in}")
    return torch.eye(fan_in, dtype=dtype, device=device) - 1.0 / fan_in


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or its copy in 32 bits where its own type is narrower."""
    if tensor.is_complex():
        return tensor.to(_ACCUMULATE_IN.get(tensor.dtype, tensor.dtype))
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _view(tensor: Tensor, vectors: WeightVectors) -> tuple[Tensor, tuple[int, ...]]:
    fitted = vectors.for_shape(tensor.shape)
    return (tensor if fitted.view is None else tensor.reshape(fitted.view)), fitted.span


def _check(tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"can't center a tensor of dtype {tensor.dtype}: a mean needs a floating or complex type")
    if tensor.layout != torch.strided:
        raise ValueError(f"can't center a sparse tensor (layout {tensor.layout}): pass tensor.to_dense()")
