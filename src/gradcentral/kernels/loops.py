"""The memory of a parameter as nested loops, which is all that the kernels need to know. Pure Python: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gradcentral.weight_vectors import WeightVectors

__all__ = ["Loop", "loop_of_vectors", "loop_over"]


class Loop(NamedTuple):
    """A parameter in memory order as four nested loops; a weight vector runs over ``a`` and ``b``.

    Element ``(g, i, u, j)`` lies at offset ``((g * a + i) * unit + u) * b + j``, and ``(g, u)`` names the output
    unit. Rows are ``(n, fan_in, 1, 1)``, columns ``(1, fan_in, n, 1)``, a transposed convolution
    ``(groups, in, out, taps)``.
    """

    group: int
    a: int
    unit: int
    b: int


def loop_over(vectors: WeightVectors | None, shape: Sequence[int], strides: Sequence[int]) -> Loop | None:
    """The loop over a tensor with these vectors; without any, every element is one of its own.

    Examples:
        >>> loop_over(None, (4, 3), (3, 1))
        Loop(group=12, a=1, unit=1, b=1)
    """
    if vectors is not None:
        return loop_of_vectors(vectors.for_shape(shape), strides)
    whole = WeightVectors(tuple(range(max(len(shape), 1))), shape=tuple(shape) or (1,))
    return None if loop_of_vectors(whole, tuple(strides) or (1,)) is None else Loop(math.prod(shape), 1, 1, 1)


def loop_of_vectors(vectors: WeightVectors, strides: Sequence[int] | None = None) -> Loop | None:
    """The canonical loop over a dense parameter with these strides (``None``: contiguous).

    Works on memory order, so a channels_last convolution is plain rows. ``None`` where the parameter is not
    dense (expanded, sliced) or the pattern needs more than (group, a, unit, b).
    """
    dims, steps = vectors.dims, strides
    if steps is not None and vectors.view is not None:
        assert vectors.shape is not None, "a view with strides needs the parameter's shape"
        steps = split_strides(vectors.shape, steps, vectors.view)
        if steps is None:
            return None
    if steps is None:
        steps = _contiguous(dims)
    order = sorted((axis for axis, size in enumerate(dims) if size != 1), key=lambda axis: -steps[axis])
    if [steps[axis] for axis in order] != list(_contiguous([dims[axis] for axis in order])):
        return None
    runs: list[tuple[bool, int]] = []
    for axis in order:
        spanned = axis in vectors.span
        size = dims[axis]
        if runs and runs[-1][0] == spanned:
            size *= runs.pop()[1]
        runs.append((spanned, size))
    return _loop_of_runs(runs)


def _loop_of_runs(runs: list[tuple[bool, int]]) -> Loop | None:
    """Fit alternating runs (is it spanned, size) into (group, a, unit, b)."""
    if len(runs) == 1 or (len(runs) == 2 and runs[1][0]):
        # Rows: one pass over `a` beats `unit` and `b`, which would be the same elements.
        spanned = math.prod(size for is_spanned, size in runs if is_spanned)
        return Loop(math.prod(size for is_spanned, size in runs if not is_spanned), spanned, 1, 1)
    slots, at = [1, 1, 1, 1], 0
    for is_spanned, size in runs:
        while at < 4 and (at % 2 == 1) != is_spanned:
            at += 1
        if at == 4:
            return None
        slots[at] = size
        at += 1
    return Loop(*slots)


def split_strides(shape: Sequence[int], strides: Sequence[int], view: Sequence[int]) -> list[int] | None:
    """Strides of ``view`` when it only splits axes of ``shape``; None where it would merge axes."""
    steps: list[int] = []
    at = 0
    for size, stride in zip(shape, strides, strict=True):
        taken: list[int] = []
        while at < len(view) and math.prod(taken) * view[at] <= size and (math.prod(taken) < size or view[at] == 1):
            taken.append(view[at])
            at += 1
        if math.prod(taken) != size:
            return None
        steps += [stride * math.prod(taken[i + 1 :]) for i in range(len(taken))]
    return steps if at == len(view) else None


def _contiguous(dims: Sequence[int]) -> list[int]:
    return [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
