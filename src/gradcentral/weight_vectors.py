"""Which elements of a parameter form one weight vector, and the notation for it. Pure Python: no torch, no numpy.

A layout is written like a shape, with brackets around the axes that one weight vector runs over (as in einx):

    "o [i]"            Linear
    "o [i k k]"        convolution
    "[i] o"            weights used as x @ w, such as GPT-2's Conv1D
    "(g [i]) o [k k]"  grouped transposed convolution: the first axis is split into groups
    "e [i] o"          experts

Every index of the axes outside the brackets is one output unit. The paper (section 3.2) unfolds weights into a matrix
whose *columns* are the weight vectors, (in·k·k) × out; torch stores most layers with one unit per row instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import index

__all__ = ["WeightVectors", "as_vectors", "check_pattern"]


@dataclass(frozen=True)
class WeightVectors:
    """The weight vectors of one parameter: viewed as ``view``, one vector runs over the axes ``span``.

    A pattern such as ``"o [i k k]"`` is accepted wherever a `WeightVectors` is; see `parse`.

    Args:
        span: axes of the view that one weight vector runs over; negative axes count from the end.
        view: shape to view the parameter as, with as many elements as the parameter. Default: its own shape.
        shape: shape of the parameter, which layouts fill in. ``fan_in`` and ``count`` need it or ``view``.
        names: names of the axes of the view, used to print the pattern.

    Raises:
        ValueError: an axis is repeated or out of range, ``span`` is empty, or ``view`` and ``shape`` differ in
            their number of elements.

    Source: Yong et al. 2020, section 3.2.

    Examples:
        A convolution of 16 filters, each with 3·5·5 incoming weights:

        >>> filters = WeightVectors(span=(1, 2, 3), shape=(16, 3, 5, 5))
        >>> filters.count, filters.fan_in
        (16, 75)
    """

    span: tuple[int, ...]
    view: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("span", "view", "shape"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(int, value)))
        span, view, shape = self.span, self.view, self.shape
        for name, sizes in (("view", view), ("shape", shape)):
            if sizes is not None and min(sizes, default=0) < 0:
                raise ValueError(f"{name} {sizes} has a negative size; write every size out")
        if not span:
            raise ValueError("span is empty: name at least one axis that a weight vector runs over")
        if view is not None and shape is not None and math.prod(view) != math.prod(shape):
            raise ValueError(f"view {view} has {math.prod(view)} elements, but shape {shape} has {math.prod(shape)}")
        if (dims := shape if view is None else view) is not None:
            for axis in span:
                if not -len(dims) <= axis < len(dims):
                    raise ValueError(f"span {span}: axis {axis} is out of range for the view {dims}")
            object.__setattr__(self, "span", tuple(sorted(axis % len(dims) for axis in span)))
        if len(set(self.span)) != len(span):
            raise ValueError(f"span {span} names an axis twice")

    @classmethod
    def parse(cls, pattern: str, shape: Sequence[int], /, **sizes: int | Sequence[int]) -> WeightVectors:
        """Read a pattern such as ``"(g [i]) o [k k]"`` for a parameter of the given shape.

        A pattern has one name per axis of the parameter. Brackets mark the axes that one weight vector runs over;
        parentheses split an axis, outermost factor first; a number is an axis of that size; ``k...`` stands for any
        number of axes. Unlike in einops, axes of the same name may differ in size: ``k k`` also covers a 3×5 kernel.

        Args:
            pattern: names, numbers, brackets and parentheses, separated by spaces.
            shape: shape of the parameter.
            sizes: sizes of named axes, which determine how axes are split and are checked against the shape; a
                sequence has one size for each axis of that name.

        Raises:
            ValueError: the pattern is malformed, has no brackets, or does not fit the shape; an axis is split and more
                than one of the sizes is unknown; ``sizes`` names an axis that the pattern does not have.
            TypeError: the pattern is not text; a size is not an integer.

        Examples:
            >>> WeightVectors.parse("o [i k k]", (16, 3, 5, 5))
            WeightVectors(span=(1, 2, 3), view=None, shape=(16, 3, 5, 5))
            >>> WeightVectors.parse("(g [i]) o [k k]", (8, 3, 5, 5), g=2).view
            (2, 4, 3, 5, 5)
            >>> WeightVectors.parse("(2 [i]) o [k...]", (8, 3, 5, 5)).fan_in
            100
        """
        shape = tuple(shape)
        try:
            groups = _sized(_read(pattern), shape, sizes)
        except (ValueError, TypeError) as error:
            raise type(error)(f"pattern {pattern!r} for shape {shape}: {error}") from None
        axes = [axis for group in groups for axis in group]
        view = tuple(axis.size or 0 for axis in axes)
        span = tuple(position for position, axis in enumerate(axes) if axis.spanned)
        return cls(span, None if len(view) == len(shape) else view, shape, tuple(axis.name for axis in axes))

    def for_shape(self, shape: Sequence[int]) -> WeightVectors:
        """Return the same weight vectors, checked against a parameter's shape."""
        return self if self.shape == tuple(shape) else replace(self, shape=tuple(shape))

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape that ``span`` refers to: the view, or the parameter's own shape."""
        dims = self.view if self.view is not None else self.shape
        if dims is None:
            raise ValueError("the shape is unknown: pass view= or shape=, or call for_shape(tensor.shape)")
        return dims

    @property
    def fan_in(self) -> int:
        """M: number of elements of one weight vector."""
        return math.prod(self.dims[axis] for axis in self.span)

    @property
    def count(self) -> int:
        """Number of weight vectors, that is, of output units."""
        return math.prod(size for axis, size in enumerate(self.dims) if axis not in self.span)

    @property
    def pattern(self) -> str:
        """The weight vectors in the notation of `parse`, which reads it back for the same shape.

        A view whose axes straddle those of the parameter has no pattern; the view is given instead.

        Examples:
            >>> WeightVectors(span=(1, 3, 4), view=(2, 4, 3, 5, 5), shape=(8, 3, 5, 5)).pattern
            '(2 [i]) o [i i]'
            >>> WeightVectors(span=(0,), view=(3, 8), shape=(4, 6)).pattern
            '[i] o of 3×8'
        """
        whole_axes = [[(size, axis)] for axis, size in enumerate(self.dims)]
        factors = whole_axes if self.view is None else _factors(self.shape, self.view)
        text = _bracketed([self._axis_text(group) for group in factors or whole_axes])
        return text if factors else f"{text} of {'×'.join(map(str, self.dims))}"

    def _axis_text(self, factors: list[tuple[int, int]]) -> tuple[str, bool]:
        """Return the text of an axis, given its factors (size, axis of the view), and whether it is spanned."""
        if not factors:
            return "1", False
        spanned = [axis in self.span for _, axis in factors]
        named = spanned.index(True) if any(spanned) else 0  # its size follows from those of the others
        texts = [str(size) for size, _ in factors]
        axis = factors[named][1]
        texts[named] = (self.names[axis] if self.names else "") or ("i" if axis in self.span else "o")
        if len(texts) == 1:
            return texts[0], spanned[0]
        return f"({_bracketed(list(zip(texts, spanned, strict=True)))})", False

    def agrees_with(self, other: WeightVectors) -> bool:
        """Return whether both describe the same sets of elements of a parameter of the same shape."""
        return self == other or _runs(self) == _runs(other)


def as_vectors(value: str | WeightVectors, shape: Sequence[int]) -> WeightVectors:
    """Return weight vectors, given as a pattern or as `WeightVectors`, checked against the parameter's shape."""
    if isinstance(value, str):
        return WeightVectors.parse(value, shape)
    if isinstance(value, WeightVectors):
        return value.for_shape(shape)
    raise TypeError(f"weight vectors must be a pattern such as 'o [i]' or WeightVectors, not {value!r}")


def check_pattern(pattern: str) -> None:
    """Raise a ValueError for a malformed pattern, before any shape is known."""
    try:
        _read(pattern)
    except ValueError as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None


@dataclass
class _Axis:
    name: str
    size: int | None
    spanned: bool
    repeats: bool  # written with an ellipsis: any number of axes


def _read(pattern: str) -> list[list[_Axis]]:
    """Read the axes of a pattern, as one list per axis of the parameter."""
    if not isinstance(pattern, str):
        raise TypeError("a pattern must be text, such as 'o [i]'")
    groups: list[list[_Axis]] = []
    opened: list[str] = []
    for token in re.findall(r"\w+(?:\.\.\.)?|\S", pattern):
        if token in ("(", "["):
            if token in opened:
                raise ValueError(f"{token!r} inside {token!r}")
            opened.append(token)
            if token == "(":
                groups.append([])
        elif token in (")", "]"):
            if not opened or opened.pop() + token not in ("()", "[]"):
                raise ValueError(f"unmatched {token!r}")
        elif (name := token.removesuffix("...")).isdecimal() or name.isidentifier():
            size = int(name) if name.isdecimal() else None
            if "(" not in opened:
                groups.append([])
            groups[-1].append(_Axis(name if size is None else "", size, "[" in opened, token != name))
        else:
            raise ValueError(f"{token!r} is not the name of an axis")
    if opened:
        raise ValueError(f"{opened[-1]!r} is not closed")
    if not all(groups):
        raise ValueError("a pair of parentheses is empty")
    if [len(group) for group in groups for axis in group if axis.repeats] not in ([], [1]):
        raise ValueError("at most one axis may have an ellipsis, and not inside parentheses")
    if not any(axis.spanned for group in groups for axis in group):
        raise ValueError("put brackets around the axes that one weight vector runs over, as in 'o [i]'")
    return groups


def _sized(
    pattern: list[list[_Axis]], shape: tuple[int, ...], sizes: dict[str, int | Sequence[int]]
) -> list[list[_Axis]]:
    """Fill in the size of every axis of a pattern; drop unspanned factors of size 1, since they split nothing."""
    times = len(shape) - len(pattern) + 1
    groups = [list(map(replace, group)) for group in pattern for _ in range(times if group[0].repeats else 1)]
    if len(groups) != len(shape):
        raise ValueError(f"the pattern has {len(groups)} axes, but the shape has {len(shape)}")
    if not any(axis.spanned for group in groups for axis in group):
        raise ValueError("no axis of the shape is inside the brackets")
    for name, value in sizes.items():
        named = [axis for group in groups for axis in group if axis.name == name]
        given = _integers(name, value, max(len(named), 1))
        if len(given) != len(named):
            raise ValueError(f"{name} = {value}, but {len(named)} axes are named {name}")
        for axis, axis_size in zip(named, given, strict=True):
            axis.size = axis_size
    for position, (group, size) in enumerate(zip(groups, shape, strict=True)):
        unknown = [axis for axis in group if axis.size is None]
        known = math.prod(axis.size for axis in group if axis.size is not None)
        if len(unknown) > 1:
            names = " and ".join(axis.name for axis in unknown)
            raise ValueError(f"the sizes of {names} are unknown; write a number for all but one, as in '(2 [i])'")
        if (size != known) if not unknown else (not known or size % known):
            raise ValueError(f"axis {position} has size {size}, which is not {'a multiple of ' * bool(unknown)}{known}")
        for axis in unknown:
            axis.size = size // known
    return [[axis for axis in group if axis.size != 1 or axis.spanned] or group[:1] for group in groups]


def _integers(name: str, value: int | Sequence[int], times: int) -> list[int]:
    """Return the sizes given for a name, an integer that holds for all of its axes or one for each of them."""
    try:
        given = list(map(index, value)) if isinstance(value, Sequence) else [index(value)] * times
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers, not {value!r}") from None
    if min(given, default=0) < 0:
        raise ValueError(f"{name} = {value} is negative; give the size of the axis")
    return given


def _factors(shape: tuple[int, ...] | None, view: tuple[int, ...]) -> list[list[tuple[int, int]]] | None:
    """Return the factors (size, axis of the view) of each axis, outermost first; None if axes of the view straddle."""
    if not shape or 0 in shape:
        return None
    factors: list[list[tuple[int, int]]] = []
    rest = list(view)
    axis = 0
    for left, following in zip(shape, (*shape[1:], None), strict=True):
        group: list[tuple[int, int]] = []
        # A view's axis of size 1 belongs to the preceding axis, unless the next one has size 1 itself.
        while axis < len(view) and (left > 1 or not group or (rest[axis] == 1 != following)):
            small, large = sorted((left, rest[axis]))
            if large % small:
                return None
            group.append((small, axis))
            left //= small
            rest[axis] //= small
            axis += rest[axis] == 1
        factors.append(group)
    return factors


def _bracketed(axes: list[tuple[str, bool]]) -> str:
    """Join the texts of axes, with brackets around runs of spanned ones."""
    runs = [(spanned, " ".join(text for text, _ in run)) for spanned, run in groupby(axes, key=lambda axis: axis[1])]
    return " ".join(f"[{run}]" if spanned else run for spanned, run in runs)


def _runs(vectors: WeightVectors) -> list[tuple[int, bool]]:
    """Merge neighboring axes of the same kind, which gives a unique form for a contiguous parameter."""
    axes = [(size, axis in vectors.span) for axis, size in enumerate(vectors.dims) if size != 1]
    return [(math.prod(size for size, _ in run), spanned) for spanned, run in groupby(axes, key=lambda axis: axis[1])]
