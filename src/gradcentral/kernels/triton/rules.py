# Triton reads the annotations of its functions: no `from __future__ import annotations` here.
"""The update rules, element by element, in Triton: the same arithmetic as kernels/c/step.h, in f32.

Algorithms 1 and 2 of Yong et al. 2020 (SGD with momentum, Adam), with torch's options:

    g ← scale · Φ(∂L/∂w)             placement "gradient"; without Φ otherwise
    d ← g + λ w                      L2 weight decay
    state ← advance(state, d)
    Δw ← change(state, d, w)
    w ← w + Δw                       or w + Φ(Δw): placement "update"

A step walks over a weight vector twice. `first` gives what is to be averaged, `second` uses the mean. Tensors travel
as the tuple ``(w, g, m, v, x)`` of pointers to weight, gradient, momentum, squares and largest squares; coefficients as
the tuple that `step.py` makes.
"""

import os

import triton
import triton.language as tl

from gradcentral.kernels.forms import Operation, Placement, UpdateRule

__all__ = ["INTERPRETED", "first", "read", "second", "step", "write"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton, which reads the same variable when it is imported, runs everything on the CPU in Python."""

# The interpreter cuts bf16 off where a GPU rounds it to nearest: there, bf16 is taken as u16 and rounded by hand.
_BY_HAND = tl.constexpr(INTERPRETED)

MOMENTUM = tl.constexpr(int(UpdateRule.MOMENTUM))
ADAM = tl.constexpr(int(UpdateRule.ADAM))
AMSGRAD = tl.constexpr(int(UpdateRule.AMSGRAD))
CENTER = tl.constexpr(int(Operation.CENTER))
GRADIENT = tl.constexpr(int(Placement.GRADIENT))


@triton.jit
def read(pointer, offsets, mask, EVICT: tl.constexpr = ""):
    """Elements as f32; 0 outside the mask."""
    x = tl.load(pointer + offsets, mask=mask, other=0, eviction_policy=EVICT)
    if _BY_HAND and pointer.dtype.element_ty == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def write(pointer, offsets, x, mask):
    """Elements of f32, rounded to nearest even."""
    tl.store(pointer + offsets, _stored(x, pointer), mask=mask, eviction_policy="evict_first")


@triton.jit
def _stored(x, pointer):
    if _BY_HAND and pointer.dtype.element_ty == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _rounded(x, pointer):
    """As it will be read again."""
    stored = _stored(x, pointer)
    if _BY_HAND and pointer.dtype.element_ty == tl.uint16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def _state(tensors, offsets, mask, RULE: tl.constexpr):
    _, _, m_at, v_at, x_at = tensors
    m, v, x = 0.0, 0.0, 0.0
    if RULE >= MOMENTUM:
        m = read(m_at, offsets, mask, "evict_first")
    if RULE >= ADAM:
        v = read(v_at, offsets, mask, "evict_first")
    if RULE == AMSGRAD:
        x = read(x_at, offsets, mask, "evict_first")
    return m, v, x


@triton.jit
def _write_state(tensors, offsets, mask, m, v, x, RULE: tl.constexpr):
    _, _, m_at, v_at, x_at = tensors
    if RULE >= MOMENTUM:
        write(m_at, offsets, m, mask)
    if RULE >= ADAM:
        write(v_at, offsets, v, mask)
    if RULE == AMSGRAD:
        write(x_at, offsets, x, mask)


@triton.jit
def _advance(m, v, x, d, c, RULE: tl.constexpr):
    _, _, _, momentum, keep, _, _, one_minus_beta1, beta2, one_minus_beta2, _, _, _ = c
    if RULE == MOMENTUM:
        m = momentum * m + keep * d
    if RULE >= ADAM:
        m = m + one_minus_beta1 * (d - m)
        v = beta2 * v + one_minus_beta2 * d * d
    if RULE == AMSGRAD:
        x = tl.where(v <= x, x, v)  # this way round, a NaN of v comes through
    return m, v, x


@triton.jit
def _change(m, v, x, d, w, c, RULE: tl.constexpr):
    _, _, decay, _, _, of_d, of_m, _, _, _, epsilon, step_size, root_correction = c
    if RULE < MOMENTUM:
        return of_d * d
    if RULE == MOMENTUM:
        return of_d * d + of_m * m
    largest = v
    if RULE == AMSGRAD:
        largest = x
    return -(decay * w + step_size * m / (tl.sqrt(largest) * root_correction + epsilon))


@triton.jit
def step(tensors, offsets, mask, shift, c, RULE: tl.constexpr):
    """One element's step; shift is scale · mean(g) where the gradient is centered, else 0."""
    w_at, g_at, _, _, _ = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    w = read(w_at, offsets, mask, "evict_first")
    g = read(g_at, offsets, mask, "evict_first")
    m, v, x = _state(tensors, offsets, mask, RULE)
    d = scale * g + (l2 * w - shift)
    m, v, x = _advance(m, v, x, d, c, RULE)
    _write_state(tensors, offsets, mask, m, v, x, RULE)
    write(w_at, offsets, w + _change(m, v, x, d, w, c, RULE), mask)


@triton.jit
def first(tensors, offsets, mask, c, RULE: tl.constexpr, PLACEMENT: tl.constexpr):
    """What is to be averaged: the gradient, or with "update" the change of w, after moving the state on.

    Where w holds enough bits, w + Δw is stored at once and `second` takes the mean off. A narrow w would lose a mean
    that is smaller than its own rounding: there `second` computes the same Δw again, from the state as it was rounded.
    """
    w_at, g_at, m_at, v_at, x_at = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    g = read(g_at, offsets, mask, "evict_last")
    if RULE >= CENTER or PLACEMENT == GRADIENT:
        return g
    w = read(w_at, offsets, mask, "evict_last")
    m, v, x = _state(tensors, offsets, mask, RULE)
    d = scale * g + l2 * w
    m, v, x = _advance(m, v, x, d, c, RULE)
    _write_state(tensors, offsets, mask, m, v, x, RULE)
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
        write(w_at, offsets, w + delta, mask)
    return tl.where(mask, delta, 0.0)


@triton.jit
def second(tensors, offsets, mask, mean, c, RULE: tl.constexpr, PLACEMENT: tl.constexpr):
    """Use the mean of what `first` gave: center, or step with a centered gradient, or center the change."""
    w_at, g_at, _, _, _ = tensors
    scale, l2, _, _, _, _, _, _, _, _, _, _, _ = c
    if RULE >= CENTER:
        write(w_at, offsets, read(w_at, offsets, mask, "evict_first") - mean, mask)
    elif PLACEMENT == GRADIENT:
        step(tensors, offsets, mask, scale * mean, c, RULE)
    else:
        w = read(w_at, offsets, mask, "evict_first")
        delta = 0.0
        if w_at.dtype.element_ty != tl.float32:
            m, v, x = _state(tensors, offsets, mask, RULE)
            d = scale * read(g_at, offsets, mask, "evict_first") + l2 * w
            delta = _change(m, v, x, d, w, c, RULE)
        write(w_at, offsets, w + (delta - mean), mask)
