# Triton reads the annotations of its functions: no `from __future__ import annotations` here.
"""The kernel: one launch for all parameters of a step, in which each program does one piece of the work (division.py).

Programs that update a part of long weight vectors wait inside the kernel for the programs that sum the other parts.
This takes one launch instead of two, and the gradients are still in the cache. A GPU starts programs in no particular
order and never suspends one in favor of another, so waiting can deadlock in general: if waiting programs filled the
device, the programs they wait for would never start. It cannot happen here, because

1. a program takes the piece not of its program id, but of a ticket that it draws when it starts (``progress[0]``), so
   that pieces start in the order of the list;
2. in the list, the sums of a block come before its steps, and a program that sums never waits.

A program therefore waits only for programs that have already started and that finish without waiting. The counter of
the block orders memory: all threads (barrier) store a sum to the L2 cache (``.cg``) before the counter is incremented
(release), and it is read after the counter has reached the number of parts (acquire). The last program of a launch
(``progress[1]``) resets the counters.
"""

import triton
import triton.language as tl

from gradcentral.kernels.forms import Operation, Placement
from gradcentral.kernels.triton.division import FIELDS, STEP, SUM, TileShape
from gradcentral.kernels.triton.rules import ADAM, CENTER, first_pass, second_pass, step

__all__ = ["run"]

_FIELDS = tl.constexpr(FIELDS)
_PLAIN = tl.constexpr(int(TileShape.PLAIN))
_PLAIN_ALIGNED = tl.constexpr(int(TileShape.PLAIN_ALIGNED))
_LONG = tl.constexpr(int(TileShape.LONG))
_LONG_ALIGNED = tl.constexpr(int(TileShape.LONG_ALIGNED))
_MIDDLE_ALIGNED = tl.constexpr(int(TileShape.MIDDLE_ALIGNED))
_SHORT = tl.constexpr(int(TileShape.SHORT))
_ACROSS = tl.constexpr(int(TileShape.ACROSS))
_ACROSS_ALIGNED = tl.constexpr(int(TileShape.ACROSS_ALIGNED))

_SUM = tl.constexpr(SUM)
_STEP = tl.constexpr(STEP)

# Memory of a tile: contiguous rows, or adjacent columns.
_ROWS = tl.constexpr(0)
_BESIDE = tl.constexpr(1)

_MEANS = tl.constexpr(int(Operation.MEANS))
_RESTORE = tl.constexpr(int(Operation.RESTORE))
_UPDATE = tl.constexpr(int(Placement.UPDATE))


@triton.jit
def _pointer(pointers, column: tl.constexpr, n_parameters, parameter, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(pointers + column * n_parameters + parameter).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _at(tensors, offset):
    w, g, m, v, x = tensors
    return w + offset, g + offset, m + offset, v + offset, x + offset


@triton.jit
def _tile(v, k, nv, nk, size, V: tl.constexpr, K: tl.constexpr, MEMORY: tl.constexpr):
    """Return offsets and mask of K elements, starting at k, of V lines, starting at v."""
    jump, stride = size
    vs = v + tl.arange(0, V)
    ks = k + tl.arange(0, K)
    if MEMORY == _BESIDE:
        offsets = ks[:, None] * jump + vs[None, :]
        mask = (ks < nk)[:, None] & (vs < nv)[None, :]
    else:
        offsets = vs[:, None] * stride + ks[None, :]
        mask = (vs < nv)[:, None] & (ks < nk)[None, :]
    return offsets, mask


@triton.jit
def _plain(tensors, n, c, K: tl.constexpr, RULE: tl.constexpr):
    """Update elements that are not centered."""
    for k in range(0, n, K):
        ks = k + tl.arange(0, K)
        step(tensors, ks, ks < n, 0.0, c, RULE)


@triton.jit
def _merge(sums, vector, V: tl.constexpr):
    """Return for each column the sum of the sums of all columns of the same weight vector."""
    same = vector[:, None] == vector[None, :]
    return tl.sum(tl.where(same, tl.broadcast_to(sums[None, :], (V, V)), 0.0), axis=1)


@triton.jit
def _vectors(
    tensors,
    c,
    nv,
    nk,
    size,
    what,
    places,
    V: tl.constexpr,
    K: tl.constexpr,
    MEMORY: tl.constexpr,
    RULE: tl.constexpr,
    PLACEMENT: tl.constexpr,
):
    """Process some weight vectors, or a part of a few long ones: sum, wait for any other parts, update."""
    fan_in, part, parts, count, partial, counter, means_at, taps, phases, tap_at, strength = places
    axis: tl.constexpr = 0 if MEMORY == _BESIDE else 1
    for v in range(0, nv, V):
        vs = v + tl.arange(0, V)
        here = vs < nv
        total = tl.zeros((K, V) if MEMORY == _BESIDE else (V, K), tl.float32)
        if what & _SUM:
            for k in range(0, nk, K):
                offsets, mask = _tile(v, k, nv, nk, size, V, K, MEMORY)
                total += first_pass(tensors, offsets, mask, c, RULE, PLACEMENT)
        sums = tl.sum(total, axis=axis)
        if parts > 1:
            if what & _SUM:
                tl.store(partial + part * count + vs, sums, mask=here, cache_modifier=".cg")
                tl.debug_barrier()
                tl.atomic_add(counter, 1, sem="release")
            else:
                while tl.atomic_add(counter, 0, sem="acquire") < parts:
                    pass
                for other in range(parts):
                    sums += tl.load(partial + other * count + vs, mask=here, other=0.0, cache_modifier=".cg")
        if what & _STEP:
            mean_of = vs
            is_first = here
            if MEMORY == _BESIDE and taps > 1:
                first = tl.load(tap_at + vs % taps * 2)
                mean_of = vs // taps * phases + tl.load(tap_at + vs % taps * 2 + 1)
                is_first = here & (first == vs % taps)
                sums = _merge(sums, vs // taps * taps + first, V)
            means = sums / fan_in
            if RULE == _MEANS:
                if part == 0:
                    tl.store(means_at + mean_of, means, mask=is_first)
            else:
                if RULE >= _RESTORE:
                    means -= tl.load(means_at + mean_of, mask=here, other=0.0)
                means = tl.where(strength != 0, strength * means, 0.0)  # even if the mean is not finite
                if PLACEMENT == _UPDATE:
                    tl.debug_barrier()  # a thread may read what another wrote in the first pass
                for k in range(0, nk, K):
                    offsets, mask = _tile(v, k, nv, nk, size, V, K, MEMORY)
                    if MEMORY == _BESIDE:
                        second_pass(tensors, offsets, mask, means[None, :], c, RULE, PLACEMENT)
                    else:
                        second_pass(tensors, offsets, mask, means[:, None], c, RULE, PLACEMENT)


@triton.jit
def _coefficients(
    pointers, n_parameters, parameter, fresh, lr, grad_scale, rule, logs, RULE: tl.constexpr, DAMPENED: tl.constexpr
):
    """Compute the scalars of kernels/c/step.h. Adam's 1 − βᵗ, where t is the counter plus 1, is computed in f64."""
    sign, l2, decay, momentum, keep, of_d, of_m, one_minus_beta1, beta2, one_minus_beta2, epsilon = rule
    log1, log1_rest, log2, log2_rest = logs
    scale = sign
    if grad_scale is not None:
        scale = sign / tl.load(grad_scale).to(tl.float32)
    if DAMPENED:
        is_fresh = tl.load(fresh + parameter) != 0
        momentum = tl.where(is_fresh, 0.0, momentum)
        keep = tl.where(is_fresh, 1.0, keep)
    step_size = lr
    root_correction = 1.0
    if RULE >= ADAM and RULE < CENTER:
        counter = tl.load(pointers + 5 * n_parameters + parameter).to(tl.pointer_type(tl.float32))
        t = tl.load(counter).to(tl.float64) + 1.0
        power1 = tl.exp(t * (tl.cast(log1, tl.float64) + log1_rest))
        power2 = tl.exp(t * (tl.cast(log2, tl.float64) + log2_rest))
        step_size = lr / (1.0 - power1).to(tl.float32)
        root_correction = 1.0 / tl.sqrt((1.0 - power2).to(tl.float32))
    return (
        scale,
        l2,
        lr * decay,
        momentum,
        keep,
        lr * of_d,
        lr * of_m,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        epsilon,
        step_size,
        root_correction,
    )


@triton.jit
def _finish(pointers, progress, fresh, n_parameters, n_counters, skipped, RULE: tl.constexpr, DAMPENED: tl.constexpr):
    """Reset the counters for the next launch and count Adam's steps; called by the last program after all others."""
    each = tl.arange(0, 1024)
    for i in range(0, n_counters + 2, 1024):
        tl.store(progress + i + each, 0, mask=i + each < n_counters + 2)
    if skipped == 0:
        for i in range(0, n_parameters, 1024):
            at, mask = i + each, i + each < n_parameters
            if RULE >= ADAM and RULE < CENTER:
                steps = tl.load(pointers + 5 * n_parameters + at, mask=mask, other=0).to(tl.pointer_type(tl.float32))
                tl.store(steps, tl.load(steps, mask=mask, other=0.0) + 1.0, mask=mask)
            if DAMPENED:
                tl.store(fresh + at, 0, mask=mask)


@triton.jit(do_not_specialize=["n_parameters", "n_counters"])
def run(
    pointers,
    parameters,
    pieces,
    progress,
    partials,
    tap_map,
    means,
    fresh,
    lr_at,
    grad_scale,
    found_inf,
    strength_at,
    n_parameters,
    n_counters,
    lr,
    strength,
    rule,
    logs,
    RULE: tl.constexpr,
    DAMPENED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PLACEMENT: tl.constexpr,
    WAITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    BESIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Do one piece of the work.

    Args:
        pointers: int64 ``[6, n_parameters]``: weights, gradients, momenta, squares, largest squares, step counters.
        parameters, pieces: the tables of division.py.
        progress: int32: tickets drawn, programs finished, then the number of summed parts of each block in parts; all
            0 between two launches.
        partials: sums of parts.
        tap_map: the taps of division.py.
        means: means of all weight vectors, written by MEANS, read by RESTORE and SHIFT.
        fresh: int32 ``[n_parameters]``, with dampening: whether a momentum buffer is new.
        lr_at, grad_scale, found_inf, strength_at: None, or one number on the device that replaces lr, divides the
            gradient, makes the step change nothing if it is not 0, or replaces the strength.
        rule: the coefficients of the update rule.
        logs: ln β₁ and ln β₂ as two f32 each.
        DAMPENED: SGD with dampening, which does not apply to the first step.
        WAITS: whether some weight vectors are cut into parts.
        ALIGNED: whether all pointers are divisible by 16 bytes.
        BESIDE: number of adjacent elements that a program takes from each of several rows.
        TILE: number of elements that are processed at a time.
    """
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float32)
    if strength_at is not None:
        strength = tl.load(strength_at).to(tl.float32)
    skipped = 0.0
    if found_inf is not None:
        skipped = tl.load(found_inf).to(tl.float32)
    program = tl.program_id(0)
    if WAITS:  # a program may only wait for programs that have already started
        program = tl.atomic_add(progress, 1)
    if skipped == 0:
        word = tl.load(pieces + 2 * program)
        index = tl.load(pieces + 2 * program + 1).to(tl.int64)
        parameter, what = (word // 4).to(tl.int64), word % 4
        row = parameters + parameter * _FIELDS
        shape, units, vectors = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        blocks, parts, rows = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
        outer, jump, stride, group_stride = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
        slot, counter, first_mean = tl.load(row + 10), tl.load(row + 11), tl.load(row + 12)
        count, taps, phases, first_tap = tl.load(row + 13), tl.load(row + 14), tl.load(row + 15), tl.load(row + 16)

        part, block = index % parts, index // parts
        group, unit = block // blocks, block % blocks * vectors
        base = group * group_stride + unit * stride + part * rows * jump
        nv = tl.minimum(vectors, units - unit).to(tl.int32)
        nk = tl.minimum(rows, outer - part * rows).to(tl.int32)
        here = group * units + unit  # the position of this piece's first line in the parameter
        places = (
            (outer * taps // phases).to(tl.float32),
            part,
            parts,
            count,
            partials + slot + here,
            progress + 2 + counter + block,
            means + first_mean + here // taps * phases,
            taps.to(tl.int32),
            phases.to(tl.int32),
            tap_map + 2 * first_tap,
            strength,
        )
        c = _coefficients(pointers, n_parameters, parameter, fresh, lr, grad_scale, rule, logs, RULE, DAMPENED)
        starts = (
            _pointer(pointers, 0, n_parameters, parameter, WEIGHT, ALIGNED),
            _pointer(pointers, 1, n_parameters, parameter, GRAD, ALIGNED),
            _pointer(pointers, 2, n_parameters, parameter, STATE, ALIGNED),
            _pointer(pointers, 3, n_parameters, parameter, STATE, ALIGNED),
            _pointer(pointers, 4, n_parameters, parameter, STATE, ALIGNED),
        )
        # The multiplication by 16 lets the compiler infer that aligned values are divisible by 16.
        at, at16 = _at(starts, base), _at(starts, base // 16 * 16)
        near, far = jump.to(tl.int32), stride.to(tl.int32)  # offsets inside a piece are below 2³¹
        size, size16 = (near, far), (near // 16 * 16, far // 16 * 16)
        nv16, nk16 = nv // 16 * 16, nk // 16 * 16
        if shape == _PLAIN:
            if RULE < CENTER:
                _plain(at, nv, c, TILE, RULE)
        elif shape == _PLAIN_ALIGNED:
            if RULE < CENTER:
                _plain(at16, nv16, c, TILE, RULE)
        elif shape == _LONG:
            _vectors(at, c, nv, nk, size, what, places, 1, TILE, _ROWS, RULE, PLACEMENT)
        elif shape == _LONG_ALIGNED:
            _vectors(at16, c, nv, nk16, size16, what, places, 1, TILE, _ROWS, RULE, PLACEMENT)
        elif shape == _MIDDLE_ALIGNED:
            _vectors(at16, c, nv, nk16, size16, what, places, TILE // BESIDE, BESIDE, _ROWS, RULE, PLACEMENT)
        elif shape == _SHORT:
            _vectors(at, c, nv, nk, size, what, places, TILE // 16, 16, _ROWS, RULE, PLACEMENT)
        elif shape == _ACROSS:
            _vectors(at, c, nv, nk, size, what, places, BESIDE, TILE // BESIDE, _BESIDE, RULE, PLACEMENT)
        else:
            _vectors(at16, c, nv16, nk, size16, what, places, BESIDE, TILE // BESIDE, _BESIDE, RULE, PLACEMENT)
    if WAITS or (RULE >= ADAM and RULE < CENTER) or DAMPENED:
        tl.debug_barrier()  # all threads have read the values that the last program resets
        if tl.atomic_add(progress + 1, 1) == tl.num_programs(0) - 1:
            _finish(pointers, progress, fresh, n_parameters, n_counters, skipped, RULE, DAMPENED)
