"""The mathematics of Gradient Centralization, one tensor at a time, in torch.

    Φ(g) = g − mean(g) = P g,  P = I − e eᵀ,  e = (1, …, 1)/√M,  M = fan-in          (Yong et al. 2020, eq. 1 and 2)

    placement "gradient":     the optimizer receives Φ(∂L/∂w)                        `center`
    placement "regularized":  the optimizer receives g′ with g′ + λw = P(∂L/∂w + λw) `center_regularized`
    placement "update":       w ← w + Φ(Δw), Δw the whole change of a step           `restore_means_`

Every faster path (kernels, compiled graphs, sharded tensors) is tested to equal these functions.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from gradcentral.weight_vectors import WeightVectors, as_vectors

__all__ = [
    "Pair",
    "Strength",
    "as_number",
    "center",
    "center_",
    "center_regularized",
    "checked_strength",
    "positive_or_one",
    "projection_matrix",
    "restore_means_",
    "scaled",
    "share",
    "subtract_means_",
    "unit_means",
]

Pair = tuple[Tensor, WeightVectors]
"""A tensor and its weight vectors."""

Strength = float | Tensor
"""s of P_s = I − s·eeᵀ: a number between 0 and 1, or a 0-dim tensor of one."""


def center(tensor: Tensor, vectors: WeightVectors | str, strength: Strength = 1.0) -> Tensor:
    """Return Φ(g): subtract from each weight vector its mean. Pure and differentiable.

    Args:
        tensor: any floating-point or complex dtype, any strides. Types narrower than 32 bits are averaged in float32
            and rounded once.
        vectors: which elements form one weight vector: `WeightVectors`, or a pattern such as ``"o [i k k]"``.
        strength: s of P_s = I − s·eeᵀ, from 0 (off) to 1 (GC): g − s·mean(g).

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError: the tensor is neither floating-point nor complex.
        ValueError: the tensor is sparse, ``vectors`` does not fit its shape or is not a valid pattern, or ``strength``
            is not between 0 and 1.

    Source: Yong et al. 2020, eq. 1.

    Examples:
        >>> import torch
        >>> from gradcentral import center
        >>> center(torch.tensor([[1.0, 2.0, 6.0]]), "o [i]")
        tensor([[-2., -1.,  3.]])
    """
    _check(tensor)
    strength = checked_strength(strength)
    g = _at_least_32_bits(tensor)
    view, span = _view(g, as_vectors(vectors, tensor.shape))
    return (view - scaled(_mean(view, span), strength)).reshape(tensor.shape).to(tensor.dtype)


def center_(tensor: Tensor, vectors: WeightVectors, strength: Strength = 1.0) -> Tensor:
    """Apply `center` in place; the tensor keeps its storage and strides.

    Raises:
        TypeError, ValueError: as `center`.
        RuntimeError: several elements share memory (an expanded tensor), as for every in-place operation of torch.
    """
    return subtract_means_(tensor, scaled(unit_means(tensor, vectors), strength), vectors)


def center_regularized(
    gradient: Tensor, weights: Tensor, l2: float | Tensor, vectors: WeightVectors, strength: Strength = 1.0
) -> Tensor:
    """Return the gradient with which L2 weight decay gives a centered sum (placement "regularized").

        g′ = g − s·mean(g + λw),   so that   g′ + λw = P_s(g + λw);   for s = 1, g′ = Φ(g) − λ·mean(w)

    Args:
        gradient: g = ∂L/∂w.
        weights: w, of the same shape.
        l2: λ, which the optimizer multiplies the weights by before it adds them to the gradient.
        vectors: which elements form one weight vector.
        strength: s.

    Source: Yong et al. 2020, section 3.4.
    """
    _check(gradient)
    view, span = _view(_at_least_32_bits(gradient), vectors)
    mean = _mean(view, span)
    if isinstance(l2, Tensor) or l2 != 0:  # without weight decay an infinite weight would give NaN
        mean = mean + l2 * unit_means(weights, vectors)
    return (view - scaled(mean, strength)).reshape(gradient.shape).to(gradient.dtype)


def restore_means_(weights: Tensor, means: Tensor, vectors: WeightVectors, strength: Strength = 1.0) -> Tensor:
    """Shift each weight vector in place so that its mean is ``means`` again (placement "update").

        w ← w − s·(mean(w) − m),   m = mean(w_old)

    After a step w = w_old + Δw, so the result is w_old + Δw − s·mean(Δw) = w_old + P_s(Δw), for any optimizer, without
    a copy of w_old. It keeps the constraint eᵀ(w − w⁰) = 0. A weight vector that is not finite has no mean to restore,
    so it is not shifted.

    Args:
        weights: the weights after a step.
        means: `unit_means` of the weights before it.
        vectors: which elements form one weight vector.
        strength: s; the mean moves by (1 − s) times as much as in the plain step.

    Source: Yong et al. 2020, eq. 4.
    """
    shift = scaled(unit_means(weights, vectors) - means, strength)
    return subtract_means_(weights, torch.where(shift.isfinite(), shift, 0), vectors)


def checked_strength(strength: Strength, name: str = "strength") -> Strength:
    """Return a strength that may be used. A tensor on another device than the CPU is not read, as that would wait.

    Raises:
        ValueError: it is not a number between 0 and 1, or a tensor of one (with ``name``).
    """
    if isinstance(strength, Tensor):
        if strength.ndim or strength.is_complex() or strength.dtype == torch.bool:
            found = f"shape {tuple(strength.shape)}" if strength.ndim else f"dtype {strength.dtype}"
            raise ValueError(f"{name} must be a number or a 0-dim tensor, not one of {found}")
        if not strength.is_cpu or torch.compiler.is_compiling():
            return strength
        strength_now = float(strength.detach())
    elif isinstance(strength, (float, Real)):  # float first, which is the common case and faster to check
        strength = strength_now = float(strength)
    else:
        raise ValueError(f"{name} must be a number or a 0-dim tensor between 0 and 1, not {strength!r}")
    if not 0 <= strength_now <= 1:
        raise ValueError(f"{name} must be between 0 and 1, not {strength_now}")
    return strength


def as_number(strength: Strength) -> Strength:
    """Return the number in a tensor on the CPU. One on another device stays there, for kernels and CUDA graphs."""
    if isinstance(strength, Tensor) and strength.is_cpu and not torch.compiler.is_compiling():
        return float(strength.detach())
    return strength


def scaled(means: Tensor, strength: Strength) -> Tensor:
    """Return s·mean; 0 for a strength of 0, even if the mean is not finite."""
    if isinstance(strength, Tensor):
        strength = strength.to(means.device)
        return torch.where(strength == 0, 0, strength * means)
    return means if strength == 1 else torch.zeros_like(means) if strength == 0 else strength * means


def unit_means(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Return the mean of each weight vector, in float32 or wider; the spanned axes of the view are kept with size 1."""
    _check(tensor)
    return _mean(*_view(_at_least_32_bits(tensor), vectors))


def subtract_means_(tensor: Tensor, means: Tensor, vectors: WeightVectors) -> Tensor:
    """Subtract one number per weight vector, shaped as `unit_means` returns them, in place and with one rounding."""
    dims = vectors.for_shape(tensor.shape).dims
    if vectors.view is None:
        return tensor.sub_(means)
    try:
        tensor.view(dims).sub_(means)
    except RuntimeError:  # the strides do not allow this view
        tensor.sub_(means.expand(dims).reshape(tensor.shape))
    return tensor


def share(tensor: Tensor, vectors: WeightVectors | str) -> Tensor:
    """Return the fraction of a gradient's energy that centering removes: 1 − ‖Φ(g)‖²/‖g‖² = ‖eᵀg‖²/‖g‖².

    Returns:
        A real scalar tensor between 0 and 1; 0 where the tensor is all zero, NaN where it is not finite.

    Raises:
        TypeError, ValueError: as `center`.

    Source: ‖Φ(g)‖² = ‖g‖² − ‖eᵀg‖², Yong et al. 2020, theorem 4.2.

    Examples:
        >>> import torch
        >>> from gradcentral import share
        >>> share(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), "o [i]")
        tensor(0.5000)
    """
    _check(tensor)
    vectors = as_vectors(vectors, tensor.shape)
    g = _at_least_32_bits(tensor)
    if not g.numel():
        return g.abs().sum()
    # The squares of 1e-25 and 1e25 do not fit into float32, so the largest entry is scaled to 1.
    g = g / positive_or_one(g.detach().abs().amax())
    fan_in = vectors.for_shape(tensor.shape).fan_in
    total = g.abs().square().sum()
    removed = fan_in * unit_means(g, vectors).abs().square().sum()
    return (removed / positive_or_one(total)).clamp(max=1)  # rounding may exceed 1


def positive_or_one(scale: Tensor) -> Tensor:
    """Return a scale that one can divide by: 1 in place of 0."""
    return torch.where(scale == 0, 1, scale)


def projection_matrix(
    fan_in: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return P = I − e eᵀ of shape ``[fan_in, fan_in]``: Φ(g) = P g. For analysis and tests; centering never forms it.

    Raises:
        ValueError: ``fan_in`` is not positive.

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


def _at_least_32_bits(tensor: Tensor) -> Tensor:
    # A sum of a thousand half-precision numbers is too inaccurate for their mean, so accumulate in float32.
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _mean(view: Tensor, span: tuple[int, ...]) -> Tensor:
    # A sum in float32 overflows where its mean does not. MPS has no float64.
    wide = None if view.device.type == "mps" else _WIDE.get(view.dtype)
    return view.mean(span, keepdim=True, dtype=wide).to(view.dtype)


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _view(tensor: Tensor, vectors: WeightVectors) -> tuple[Tensor, tuple[int, ...]]:
    fitted = vectors.for_shape(tensor.shape)
    return (tensor if fitted.view is None else tensor.reshape(fitted.view)), fitted.span


def _check(tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(
            f"cannot center a tensor of dtype {tensor.dtype}: its mean needs a floating-point or complex type"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"cannot center a sparse tensor (layout {tensor.layout}): pass tensor.to_dense()")
