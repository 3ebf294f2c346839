# Triton reads the annotations of its functions: no `from __future__ import annotations` here.
"""The update rules, element by element, in Triton: the arithmetic of kernels/c/step.h, in f32.

Algorithms 1 and 2 of Yong et al. 2020 (SGD with momentum, Adam), with torch's options:

    g ← scale · Φ(∂L/∂w)             placement "gradient"; without Φ otherwise
    d ← g + λ w                      L2 weight decay; Φ(g + λ w): placement "regularized"
    state ← advance(state, d)
    Δw ← change(state, d, w)
    w ← w + Δw                       or w + Φ(Δw): placement "update"

The differences from the paper and from torch are those that step.h lists, and two more:

1. Sums are f32, not f64, which many GPUs compute at 1/32 or 1/64 of the rate. The loss of accuracy is small: each of
   the 1024 lanes of a tile adds only its share of the elements, and the lanes are added in a tree.
2. Adam's bias corrections are computed on the device, from the step counters there, so that steps need no
   synchronization and can be captured in CUDA graphs.

A step reads a weight vector twice: `first_pass` returns the values to be averaged, `second_pass` uses the mean.
Centering without a step is a rule of its own (CENTER, MEANS, RESTORE, SHIFT), whose first pass returns the tensor.
Tensors are passed as the tuple ``(w, g, m, v, x)`` of pointers to weight, gradient, momentum, squares and largest
squares; coefficients are passed as the tuple that `step.py` creates.
"""

import triton
import triton.language as tl

from gradcentral.kernels.forms import Operation, Placement, UpdateRule
from gradcentral.kernels.triton.interpreter import INTERPRETED

__all__ = ["first_pass", "second_pass", "step"]

# A GPU rounds f32 to the nearest bf16, but the interpreter truncates. There, bf16 is u16 and rounded explicitly.
_BY_HAND = tl.constexpr(INTERPRETED)

MOMENTUM = tl.constexpr(int(UpdateRule.MOMENTUM))
ADAM = tl.constexpr(int(UpdateRule.ADAM))
AMSGRAD = tl.constexpr(int(UpdateRule.AMSGRAD))
CENTER = tl.constexpr(int(Operation.CENTER))
RESTORE = tl.constexpr(int(Operation.RESTORE))
GRADIENT = tl.constexpr(int(Placement.GRADIENT))
UPDATE = tl.constexpr(int(Placement.UPDATE))
REGULARIZED = tl.constexpr(int(Placement.REGULARIZED))


@triton.jit
def _as_f32(stored, pointer):
    if _BY_HAND and pointer.dtype.element_ty == tl.uint16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def _as_stored(x, pointer):
    """Convert to the stored type, rounding to nearest even."""
    if _BY_HAND and pointer.dtype.element_ty == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _rounded(x, pointer):
    """Return the value that a load after storing x returns."""
    return _as_f32(_as_stored(x, pointer), pointer)


@triton.jit
def _load(pointer, offsets, mask, EVICT: tl.constexpr = ""):
    """Load elements as f32, with 0 outside the mask."""
    return _as_f32(tl.load(pointer + offsets, mask=mask, other=0, eviction_policy=EVICT), pointer)


@triton.jit
def _store(pointer, offsets, x, mask):
    tl.store(pointer + offsets, _as_stored(x, pointer), mask=mask, eviction_policy="evict_first")


@triton.jit
def _is_finite(x):
    return x - x == 0


@triton.jit
def _l2_term(l2, w):
    """Return l2 · w, or 0 without L2 weight decay, where an infinite weight would give NaN."""
    return tl.where(l2 != 0, l2 * w, 0.0)


@triton.jit
def _load_state(tensors, offsets, mask, RULE: tl.constexpr):
    _, _, m_at, v_at, x_at = tensors
    m, v, x = 0.0, 0.0, 0.0
    if RULE >= MOMENTUM:
        m = _load(m_at, offsets, mask, "evict_first")
    if RULE >= ADAM:
        v = _load(v_at, offsets, mask, "evict_first")
    if RULE == AMSGRAD:
        x = _load(x_at, offsets, mask, "evict_first")
    return m, v, x


@triton.jit
def _store_state(tensors, offsets, mask, m, v, x, RULE: tl.constexpr):
    _, _, m_at, v_at, x_at = tensors
    if RULE >= MOMENTUM:
        _store(m_at, offsets, m, mask)
    if RULE >= ADAM:
        _store(v_at, offsets, v, mask)
    if RULE == AMSGRAD:
        _store(x_at, offsets, x, mask)


@triton.jit
def _advance(m, v, x, d, c, RULE: tl.constexpr):
    _, _, _, momentum, keep, _, _, one_minus_beta1, beta2, one_minus_beta2, _, _, _ = c
    if RULE == MOMENTUM:
        m = momentum * m + keep * d
    if RULE >= ADAM:
        # torch's lerp, which starts from the nearer end
        from_d = one_minus_beta1 >= 0.5
        m = tl.where(from_d, d, m) + tl.where(from_d, one_minus_beta1 - 1, one_minus_beta1) * (d - m)
        v = beta2 * v + one_minus_beta2 * d * d
    if RULE == AMSGRAD:
        x = tl.where((x > v) | (x != x), x, v)  # a NaN in either propagates
    return m, v, x


@triton.jit
def _change(m, v, x, d, w, c, RULE: tl.constexpr):
    _, _, decay, _, _, of_d, of_m, _, _, _, epsilon, step_size, root_correction = c
    if RULE < MOMENTUM:
        return of_d * d
    if RULE == MOMENTUM:
        return tl.where(of_d != 0, of_d * d, 0.0) + of_m * m
    largest = v
    if RULE == AMSGRAD:
        largest = x
    return -(tl.where(_is_finite(w), decay * w, 0.0) + step_size * m / (tl.sqrt(largest) * root_correction + epsilon))


@triton.jit
def step(tensors, offsets, mask, shift, c, RULE: tl.constexpr):
    """Update elements; ``shift`` is the mean of scale · g, or with placement "regularized" of d; otherwise 0."""
    w_at, g_at, _, _, _ = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    w = _load(w_at, offsets, mask, "evict_first")
    g = _load(g_at, offsets, mask, "evict_first")
    m, v, x = _load_state(tensors, offsets, mask, RULE)
    d = scale * g + (_l2_term(l2, w) - shift)
    m, v, x = _advance(m, v, x, d, c, RULE)
    _store_state(tensors, offsets, mask, m, v, x, RULE)
    _store(w_at, offsets, w + _change(m, v, x, d, w, c, RULE), mask)


@triton.jit
def first_pass(tensors, offsets, mask, c, RULE: tl.constexpr, PLACEMENT: tl.constexpr):
    """Return the values to be averaged: g, g + λw, or with placement "update" Δw, after advancing the state.

    In f32, this pass stores w + Δw, and `second_pass` subtracts the mean from it. In a narrow dtype that would round
    twice, and a mean smaller than the rounding error of w would be lost in every weight. There `second_pass` computes
    the same Δw again, from the state rounded for storage, and rounds w + (Δw − mean(Δw)) once.
    """
    w_at, g_at, m_at, v_at, x_at = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    g = _load(g_at, offsets, mask, "evict_last")
    if RULE >= CENTER or PLACEMENT == GRADIENT:
        return g
    w = _load(w_at, offsets, mask, "evict_last")
    if PLACEMENT == REGULARIZED:
        return scale * g + _l2_term(l2, w)
    m, v, x = _load_state(tensors, offsets, mask, RULE)
    d = scale * g + _l2_term(l2, w)
    m, v, x = _advance(m, v, x, d, c, RULE)
    _store_state(tensors, offsets, mask, m, v, x, RULE)
    if w_at.dtype.element_ty != tl.float32:
        if RULE >= MOMENTUM:
            m = _rounded(m, m_at)
        if RULE >= ADAM:
            v = _rounded(v, v_at)
        if RULE == AMSGRAD:
            x = _rounded(x, x_at)
        delta = _change(m, v, x, d, w, c, RULE)
    else:
        delta = _change(m, v, x, d, w, c, RULE)
        _store(w_at, offsets, w + delta, mask)
    # A weight vector with an infinite weight has no mean to keep, so it is left as this pass makes it.
    return tl.where(mask, delta + 0.0 * w, 0.0)


@triton.jit
def second_pass(tensors, offsets, mask, mean, c, RULE: tl.constexpr, PLACEMENT: tl.constexpr):
    """Apply the mean of the first pass: center, or step with a centered gradient, or center the change."""
    w_at, g_at, _, _, _ = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    if RULE == RESTORE or (RULE < CENTER and PLACEMENT == UPDATE):
        mean = tl.where(_is_finite(mean), mean, 0.0)
    if RULE >= CENTER:
        _store(w_at, offsets, _load(w_at, offsets, mask, "evict_first") - mean, mask)
    elif PLACEMENT == GRADIENT:
        step(tensors, offsets, mask, scale * mean, c, RULE)
    elif PLACEMENT == REGULARIZED:
        step(tensors, offsets, mask, mean, c, RULE)
    else:
        w = _load(w_at, offsets, mask, "evict_first")
        delta = 0.0
        if w_at.dtype.element_ty != tl.float32:
            m, v, x = _load_state(tensors, offsets, mask, RULE)
            d = scale * _load(g_at, offsets, mask, "evict_first") + _l2_term(l2, w)
            delta = _change(m, v, x, d, w, c, RULE)
        _store(w_at, offsets, w + (delta - mean), mask)
