"""Which elements of a parameter make one weight vector. Pure Python: no torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Loop", "WeightVectors", "loop_over"]


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


@dataclass(frozen=True)
class WeightVectors:
    """The weight vectors of one parameter: view it as ``view``; one vector runs over the axes ``span``.

    Every index of the axes outside ``span`` is one output unit.

    Args:
        span: axes of the view that one weight vector runs over; negative axes count from the end.
        view: shape to view the parameter as, with as many elements as the parameter. ``None``: its own shape.
        shape: the parameter's shape. A layout fills it in (see `for_shape`); ``fan_in`` and ``count`` need it or
            ``view``.

    Raises:
        ValueError: an axis is repeated or out of range, ``span`` is empty, or ``view`` and ``shape`` differ in
            their number of elements.

    Examples:
        A convolution of 16 filters, each with 3·5·5 incoming weights:

        >>> filters = WeightVectors(span=(1, 2, 3), shape=(16, 3, 5, 5))
        >>> filters.count, filters.fan_in
        (16, 75)

        A transposed convolution with 2 groups, weight ``[in, out/groups, k, k]``:

        >>> WeightVectors(span=(1, 3, 4), view=(2, 4, 3, 5, 5)).for_shape((8, 3, 5, 5)).fan_in
        100
    """

    span: tuple[int, ...]
    view: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        span, view, shape = tuple(self.span), _shape(self.view), _shape(self.shape)
        if not span:
            raise ValueError("span is empty: name at least one axis that a weight vector runs over")
        if view is not None and shape is not None and math.prod(view) != math.prod(shape):
            raise ValueError(f"view {view} has {math.prod(view)} elements, the shape {shape} {math.prod(shape)}")
        dims = view if view is not None else shape
        if dims is not None:
            outside = [axis for axis in span if not -len(dims) <= axis < len(dims)]
            if outside:
                raise ValueError(f"span {span}: axis {outside[0]} is out of range for the view {dims}")
            span = tuple(sorted(axis % len(dims) for axis in span))
        if len(set(span)) != len(span):
            raise ValueError(f"span {span} names an axis twice")
        object.__setattr__(self, "span", span)
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "shape", shape)

    def for_shape(self, shape: Sequence[int]) -> WeightVectors:
        """The same weight vectors, checked against a parameter of this shape and knowing it."""
        if self.shape == tuple(shape):
            return self
        return WeightVectors(self.span, self.view, tuple(shape))

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape that ``span`` counts axes of: the view, or the parameter's own shape."""
        dims = self.view if self.view is not None else self.shape
        if dims is None:
            raise ValueError("the shape is not known: give view=, or shape= (for_shape(tensor.shape))")
        return dims

    @property
    def fan_in(self) -> int:
        """M: number of elements of one weight vector."""
        return math.prod(self.dims[axis] for axis in self.span)

    @property
    def count(self) -> int:
        """Number of weight vectors, that is of output units."""
        return math.prod(size for axis, size in enumerate(self.dims) if axis not in self.span)

    def loop(self, strides: Sequence[int] | None = None) -> Loop | None:
        """The canonical loop over a dense parameter with these strides (``None``: contiguous).

        Works on memory order, so a channels_last convolution is plain rows. ``None`` where the parameter is not
        dense (expanded, sliced) or the pattern needs more than (group, a, unit, b).
        """
        dims, steps = self.dims, strides
        if steps is not None and self.view is not None:
            assert self.shape is not None, "a view with strides needs the parameter's shape"
            steps = split_strides(self.shape, steps, self.view)
            if steps is None:
                return None
        if steps is None:
            steps = _contiguous(dims)
        order = sorted((axis for axis, size in enumerate(dims) if size != 1), key=lambda axis: -steps[axis])
        if [steps[axis] for axis in order] != list(_contiguous([dims[axis] for axis in order])):
            return None
        runs: list[tuple[bool, int]] = []
        for axis in order:
            spanned = axis in self.span
            size = dims[axis]
            if runs and runs[-1][0] == spanned:
                size *= runs.pop()[1]
            runs.append((spanned, size))
        return _loop_of_runs(runs)

    def agrees_with(self, other: WeightVectors) -> bool:
        """Whether both mean the same sets of elements of a parameter of the same shape."""
        return self == other or _labels(self) == _labels(other)


def loop_over(vectors: WeightVectors | None, shape: Sequence[int], strides: Sequence[int]) -> Loop | None:
    """The loop over a tensor with these vectors; without any, every element is one of its own.

    Examples:
        >>> loop_over(None, (4, 3), (3, 1))
        Loop(group=12, a=1, unit=1, b=1)
    """
    if vectors is not None:
        return vectors.for_shape(shape).loop(strides)
    whole = WeightVectors(tuple(range(max(len(shape), 1))), shape=tuple(shape) or (1,))
    return None if whole.loop(tuple(strides) or (1,)) is None else Loop(math.prod(shape), 1, 1, 1)


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


def runs_of_axes(vectors: WeightVectors) -> list[list[tuple[int, bool]]] | None:
    """Each axis of the parameter as runs (size, is it spanned), the slowest first; axes of size 1 have none.

    None where the view cuts through axes, so that an index of the view is no matter of single axes.

    Examples:
        A transposed convolution with 2 groups: of the axis "in" a weight vector runs over one group's part.

        >>> runs_of_axes(WeightVectors(span=(1, 3), view=(2, 4, 3, 5), shape=(8, 3, 5)))
        [[(2, False), (4, True)], [(3, False)], [(5, True)]]
    """
    assert vectors.shape is not None, "the runs are those of a parameter's axes: for_shape(tensor.shape)"
    dims = iter(enumerate(vectors.dims))
    axis, left = -1, 1
    found: list[list[tuple[int, bool]]] = []
    for rest in vectors.shape:
        runs: list[tuple[int, bool]] = []
        while rest > 1:
            while left == 1:
                axis, left = next(dims)
            size = min(rest, left)
            if rest % size or left % size:
                return None
            rest, left = rest // size, left // size
            spanned = axis in vectors.span
            if runs and runs[-1][1] == spanned:
                size *= runs.pop()[0]
            runs.append((size, spanned))
        found.append(runs)
    return found


def _labels(vectors: WeightVectors) -> list[tuple[int, bool]]:
    """The view as merged runs of axes, which is unique for a contiguous parameter."""
    runs: list[tuple[int, bool]] = []
    for axis, size in enumerate(vectors.dims):
        if size == 1:
            continue
        spanned = axis in vectors.span
        if runs and runs[-1][1] == spanned:
            size *= runs.pop()[0]
        runs.append((size, spanned))
    return runs


def _contiguous(dims: Sequence[int]) -> list[int]:
    return [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]


def _shape(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(size) for size in value)
