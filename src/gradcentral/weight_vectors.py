"""Which elements of a parameter make one weight vector. Pure Python: no torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["WeightVectors"]


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

    def agrees_with(self, other: WeightVectors) -> bool:
        """Whether both mean the same sets of elements of a parameter of the same shape."""
        return self == other or _labels(self) == _labels(other)


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


def _shape(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(size) for size in value)
