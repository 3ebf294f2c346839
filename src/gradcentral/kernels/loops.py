"""Nested loops that describe a parameter's memory to the kernels. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradcentral.weight_vectors import WeightVectors

__all__ = ["Loop", "loop_of_vectors", "loop_over"]


@dataclass(frozen=True)
class Loop:
    """A parameter in memory order as four nested loops; a weight vector runs over ``outer`` and ``inner``.

    Element ``(g, i, u, j)`` of ``groups × outer × units × inner`` lies at offset
    ``((g * outer + i) * units + u) * inner + j``, and ``(g, u)`` is the output unit:

    ======================  ======================================
    layout                  ``(groups, outer, units, inner)``
    ======================  ======================================
    rows                    ``(n, fan_in, 1, 1)``
    columns                 ``(1, fan_in, n, 1)``
    transposed convolution  ``(groups, in per group, out, taps)``
    ======================  ======================================

    Iterating over it yields these four sizes, whose product is the number of elements.

    With ``taps``, the weight vectors of a unit share its inner loop: ``taps`` are the sizes of the axes that the inner
    loop consists of, the first of which lies inside a weight vector, the second counts weight vectors, and so on. A
    transposed convolution with kernel 4 and stride 2 has the taps ``(2, 2, 2, 2)``.
    """

    groups: int
    outer: int
    units: int
    inner: int
    taps: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[int]:
        return iter((self.groups, self.outer, self.units, self.inner))

    @property
    def phases(self) -> int:
        """Number of weight vectors per unit."""
        return math.prod(self.taps[1::2])

    def first_of_phase(self) -> list[int]:
        """Return, for each position of the inner loop, the first position in the same weight vector.

        Examples:
            >>> Loop(1, 6, 3, 4, taps=(2, 2)).first_of_phase()
            [0, 1, 0, 1]
        """
        first, step = [0], self.inner
        for axis, size in enumerate(self.taps or (self.inner,)):
            step //= size
            first = [position + at * step * (axis % 2) for position in first for at in range(size)]
        return first


def loop_over(vectors: WeightVectors | None, shape: Sequence[int], strides: Sequence[int]) -> Loop | None:
    """Return the loop over a tensor of this shape and these strides, or None if it has none (see `loop_of_vectors`).

    Args:
        vectors: the tensor's weight vectors; None if it is not centered and every element is updated on its own.
        shape: its shape.
        strides: its strides, in elements.

    Examples:
        >>> loop_over(None, (4, 3), (3, 1))
        Loop(groups=12, outer=1, units=1, inner=1, taps=())
    """
    if vectors is not None:
        return loop_of_vectors(vectors.for_shape(shape), strides)
    whole = WeightVectors(tuple(range(max(len(shape), 1))), shape=tuple(shape) or (1,))
    return None if loop_of_vectors(whole, tuple(strides) or (1,)) is None else Loop(math.prod(shape), 1, 1, 1)


def loop_of_vectors(vectors: WeightVectors, strides: Sequence[int] | None = None) -> Loop | None:
    """Return the loop over a parameter with these weight vectors and strides (None: contiguous).

    Axes are taken in memory order, so that a channels_last convolution has the layout "rows".

    Returns:
        The loop, or None if the parameter is not dense (expanded or sliced) or the view merges axes.
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


def _loop_of_runs(runs: list[tuple[bool, int]]) -> Loop:
    """Fit alternating runs ``(is spanned, size)`` into a loop."""
    if len(runs) <= 1 or (len(runs) == 2 and runs[1][0]):
        # Rows: one loop over `outer` is faster than loops over `units` and `inner` over the same elements.
        spanned = math.prod(size for is_spanned, size in runs if is_spanned)
        return Loop(math.prod(size for is_spanned, size in runs if not is_spanned), spanned, 1, 1)
    first_is_spanned, _ = runs[0]
    groups, outer, units, *taps = [*[1] * first_is_spanned, *(size for _, size in runs)]
    return Loop(groups, outer, units, math.prod(taps), tuple(taps) if len(taps) > 1 else ())


def split_strides(shape: Sequence[int], strides: Sequence[int], view: Sequence[int]) -> list[int] | None:
    """Return the strides of ``view`` if it only splits axes of ``shape``, or None if it merges axes."""
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
