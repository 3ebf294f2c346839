"""WeightVectors: which elements form a weight vector, and the notation for it."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradcentral import WeightVectors
from gradcentral.weight_vectors import as_vectors, check_pattern
from tests.strategies import Written, shapes_and_vectors, written_patterns


@pytest.mark.parametrize(
    ("vectors", "count", "fan_in"),
    [
        (WeightVectors((1,), shape=(3, 4)), 3, 4),
        (WeightVectors((-1,), shape=(3, 4)), 3, 4),
        (WeightVectors((0,), shape=(3, 4)), 4, 3),
        (WeightVectors((0, 2, 3), shape=(2, 5, 3, 3)), 5, 18),
        (WeightVectors((1, 3), view=(2, 4, 3, 5)), 6, 20),
        (WeightVectors((0,), shape=(7,)), 1, 7),
    ],
)
def test_count_and_fan_in(vectors: WeightVectors, count: int, fan_in: int) -> None:
    assert (vectors.count, vectors.fan_in) == (count, fan_in)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"span": ()}, "span is empty"),
        ({"span": (1, 1)}, "names an axis twice"),
        ({"span": (1, -1), "shape": (2, 3)}, "names an axis twice"),
        ({"span": (2,), "shape": (2, 3)}, "axis 2 is out of range"),
        ({"span": (0,), "view": (2, 4), "shape": (3, 3)}, "8 elements"),
        ({"span": (0,), "view": (-2, -4), "shape": (4, 2)}, "has a negative size; write every size out"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightVectors(**arguments)


def test_fan_in_requires_a_shape_which_every_suggested_remedy_provides() -> None:
    with pytest.raises(ValueError, match=r"pass view= or shape=, or call for_shape\(tensor.shape\)"):
        _ = WeightVectors((1,)).fan_in
    remedies = (
        WeightVectors((1,), view=(3, 4)),
        WeightVectors((1,), shape=(3, 4)),
        WeightVectors((1,)).for_shape((3, 4)),
    )
    assert [vectors.fan_in for vectors in remedies] == [4, 4, 4]


def test_weight_vectors_can_be_pickled_and_hashed() -> None:
    vectors = WeightVectors((1,), shape=(3, 4))
    assert pickle.loads(pickle.dumps(vectors)) == vectors
    assert len({vectors, WeightVectors((-1,), shape=(3, 4)), WeightVectors.parse("units [inputs]", (3, 4))}) == 1


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((1, 2), view=(4, 2, 3), shape=(4, 6)), True),
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((0,), shape=(4, 6)), False),
        (WeightVectors((0, 1), shape=(4, 6)), WeightVectors((1,), view=(1, 24), shape=(4, 6)), True),
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((2,), view=(4, 2, 3), shape=(4, 6)), False),
    ],
)
def test_agreement_compares_elements_not_axes(one: WeightVectors, other: WeightVectors, agree: bool) -> None:
    assert one.agrees_with(other) is agree
    assert other.agrees_with(one) is agree


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "span", "view", "printed"),
    [
        ("o [i]", (3, 4), {}, (1,), None, "o [i]"),
        ("[i] o", (3, 4), {"o": 4}, (0,), None, "[i] o"),
        ("o [i k k]", (8, 3, 3, 5), {"k": (3, 5)}, (1, 2, 3), None, "o [i k k]"),
        ("e [i] o", (2, 3, 4), {}, (1,), None, "e [i] o"),
        ("o [i...]", (8, 3, 3, 5), {}, (1, 2, 3), None, "o [i i i]"),
        ("[i] o [k...]", (8, 3), {"k": ()}, (0,), None, "[i] o"),
        ("(g [i]) o [k k]", (8, 3, 5, 5), {"g": 2}, (1, 3, 4), (2, 4, 3, 5, 5), "(2 [i]) o [k k]"),
        ("(g [i]) o [k k]", (8, 3, 5, 5), {"i": 4}, (1, 3, 4), (2, 4, 3, 5, 5), "(2 [i]) o [k k]"),
        ("(g [i]) o", (8, 3), {"g": 1}, (0,), None, "[i] o"),
        ("(g [i]) o", (8, 3), {"g": 8}, (1,), (8, 1, 3), "(8 [i]) o"),
        ("o ([i] e)", (5, 12), {"e": 3}, (1,), (5, 4, 3), "o ([i] 3)"),
        ("e (2 [2 3 3])", (3, 36), {}, (2, 3, 4), (3, 2, 2, 3, 3), "e (2 [i 3 3])"),
        ("[i] o ([m] s) ([m] s)", (4, 3, 4, 6), {"s": 2}, (0, 2, 4), (4, 3, 2, 2, 3, 2), "[i] o ([m] 2) ([m] 2)"),
    ],
)
def test_patterns_are_read_and_printed(
    pattern: str,
    shape: tuple[int, ...],
    sizes: dict[str, int],
    span: tuple[int, ...],
    view: tuple[int, ...] | None,
    printed: str,
) -> None:
    vectors = WeightVectors.parse(pattern, shape, **sizes)
    assert vectors == WeightVectors(span, view, shape)
    assert vectors.pattern == printed
    assert WeightVectors.parse(printed, shape) == vectors


@given(shapes_and_vectors())
def test_a_printed_pattern_reads_back_as_the_same_weight_vectors(
    case: tuple[tuple[int, ...], WeightVectors],
) -> None:
    shape, vectors = case
    fitted = vectors.for_shape(shape)
    read = as_vectors(fitted.pattern, shape)
    assert read.agrees_with(fitted)
    assert (read.count, read.fan_in) == (fitted.count, fitted.fan_in)


@given(st.permutations([1, 2, 2, 3]), st.permutations([4, 3, 1]), st.sets(st.integers(0, 2), min_size=1))
def test_views_that_merge_axes_read_back_and_views_that_cut_across_axes_are_named(
    shape: list[int], view: list[int], span: set[int]
) -> None:
    fitted = WeightVectors(tuple(span), tuple(view), tuple(shape))
    pattern, _, named_view = fitted.pattern.partition(" of ")
    if named_view:
        assert named_view == "×".join(map(str, view))
    else:
        assert WeightVectors.parse(pattern, shape).agrees_with(fitted)


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "message"),
    [
        ("o i", (3, 4), {}, "pattern 'o i' for shape (3, 4): put brackets around the axes"),
        ("o [i", (3, 4), {}, "'[' is not closed"),
        ("(g [i) o]", (8, 4), {}, "unmatched ')'"),
        ("o [[i]]", (3, 4), {}, "'[' inside '['"),
        ("o [i] ()", (3, 4), {}, "parentheses is empty"),
        ("o! [i]", (3, 4), {}, "'!' is not the name of an axis"),
        ("o... [i...]", (3, 4), {}, "at most one axis may have an ellipsis"),
        ("o [i...]", (3,), {}, "no axis of the shape is inside the brackets"),
        ("o [i k k]", (3, 4), {}, "the pattern has 4 axes, but the shape has 2"),
        ("(3 [i]) o", (8, 4), {}, "axis 0 has size 8, which is not a multiple of 3"),
        ("o [i]", (8, 4), {"i": 3}, "axis 1 has size 4, which is not 3"),
        ("o [i]", (8, 4), {"g": 3}, "g = 3, but 0 axes are named g"),
        ("(g [i]) o", (8, 4), {"g": -2}, "g = -2 is negative; give the size of the axis"),
        ("(0 [i]) o", (8, 4), {}, "axis 0 has size 8, which is not a multiple of 0"),
        ("", (8, 4), {}, "put brackets around the axes"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(
    pattern: str, shape: tuple[int, ...], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightVectors.parse(pattern, shape, **sizes)


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("(g [i]) o", {"g": "2"}, "g must be an integer or a sequence of integers, not '2'"),
        ("(g [i]) o", {"g": 2.0}, "g must be an integer or a sequence of integers, not 2.0"),
        ("o [i...]", {"i": (2, None)}, "i must be an integer or a sequence of integers, not (2, None)"),
        (("o", "[i]"), {}, "a pattern must be text, such as 'o [i]'"),
    ],
)
def test_patterns_and_sizes_of_another_type_are_refused(pattern: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"pattern {pattern!r} for shape (8, 4): {message}")):
        WeightVectors.parse(pattern, (8, 4), **sizes)


@given(written_patterns())
@example(Written("[(a 2)] b", (8, 3), (0, 1), (4, 2, 3), {}))
@example(Written("a... [b]", (2, 3, 4), (2,), (2, 3, 4), {}))
def test_a_written_pattern_means_its_span_and_view_and_is_printed_as_such(written: Written) -> None:
    vectors = WeightVectors.parse(written.pattern, written.shape, **written.sizes)
    assert vectors == written.vectors
    printed = vectors.pattern
    again = WeightVectors.parse(printed, written.shape)  # all sizes but one per axis are printed
    assert again == vectors
    assert again.pattern == printed
    assert WeightVectors.parse(written.vectors.pattern, written.shape) == vectors  # without names


@given(written_patterns(), st.sampled_from([-1, 1]))
def test_a_pattern_for_another_number_of_axes_is_refused_with_the_pattern_and_the_shape(
    written: Written, change: int
) -> None:
    assume("..." not in written.pattern)
    shape = (*written.shape, 2)[: len(written.shape) + change]
    with pytest.raises(ValueError, match="but the shape has") as refused:
        WeightVectors.parse(written.pattern, shape)
    assert str(refused.value).startswith(f"pattern {written.pattern!r} for shape {shape}: ")


@given(st.text("oik23[]() .!", max_size=12), st.lists(st.integers(0, 9), max_size=4).map(tuple))
def test_any_text_is_either_a_pattern_or_refused_with_the_pattern_and_the_shape(
    text: str, shape: tuple[int, ...]
) -> None:
    refusal = ""
    try:
        vectors = WeightVectors.parse(text, shape)
    except ValueError as error:
        refusal = str(error)
    else:
        assert math.prod(vectors.dims) == math.prod(shape)
        check_pattern(text)
    assert not refusal or refusal.startswith(f"pattern {text!r} for shape {shape}: ")


def test_the_correction_that_a_refusal_suggests_is_accepted() -> None:
    for pattern in ("o i", "(g [i]) o"):
        with pytest.raises(ValueError, match="as in") as refused:
            as_vectors(pattern, (8, 4))
        (example,) = re.findall(r"as in '(.*)'", str(refused.value))
        corrected = pattern.replace("(g [i])", example) if "g" in pattern else example
        assert as_vectors(corrected, (8, 4)).fan_in == 4


def test_only_patterns_and_weight_vectors_are_weight_vectors() -> None:
    with pytest.raises(TypeError, match=r"a pattern such as 'o \[i\]' or WeightVectors, not \(1,\)"):
        as_vectors((1,), (3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern 'rows': put brackets"):
        check_pattern("rows")
    check_pattern("(g [i]) o [k...]")
