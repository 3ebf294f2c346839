"""WeightVectors: which elements make a weight vector."""

from __future__ import annotations

import pickle

import pytest

from gradcentral import WeightVectors


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
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightVectors(**arguments)


def test_fan_in_needs_a_shape() -> None:
    with pytest.raises(ValueError, match="for_shape"):
        _ = WeightVectors((1,)).fan_in


def test_pickles_and_hashes() -> None:
    vectors = WeightVectors((1,), shape=(3, 4))
    assert pickle.loads(pickle.dumps(vectors)) == vectors
    assert len({vectors, WeightVectors((-1,), shape=(3, 4))}) == 1


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((1, 2), view=(4, 2, 3), shape=(4, 6)), True),
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((0,), shape=(4, 6)), False),
        (WeightVectors((0, 1), shape=(4, 6)), WeightVectors((1,), view=(1, 24), shape=(4, 6)), True),
        (WeightVectors((1,), shape=(4, 6)), WeightVectors((2,), view=(4, 2, 3), shape=(4, 6)), False),
    ],
)
def test_agreement_is_about_elements_not_about_axes(one: WeightVectors, other: WeightVectors, agree: bool) -> None:
    assert one.agrees_with(other) is agree
    assert other.agrees_with(one) is agree
