"""WeightVectors: which elements make a weight vector, and the loop over them in memory order."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given

from gradcentral import WeightVectors
from gradcentral.weight_vectors import Loop
from tests.strategies import Case, cases


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
    ("vectors", "loop"),
    [
        (WeightVectors((1, 2, 3), shape=(8, 3, 5, 5)), Loop(8, 75, 1, 1)),
        (WeightVectors((0,), shape=(8, 3)), Loop(1, 8, 3, 1)),
        (WeightVectors((0, 2, 3), shape=(8, 3, 5, 5)), Loop(1, 8, 3, 25)),
        (WeightVectors((1, 3, 4), view=(2, 4, 3, 5, 5), shape=(8, 3, 5, 5)), Loop(2, 4, 3, 25)),
        (WeightVectors((1,), shape=(6, 8, 3)), Loop(6, 8, 3, 1)),
        (WeightVectors((0, 1), shape=(8, 3)), Loop(1, 24, 1, 1)),
    ],
)
def test_loop_of_a_contiguous_parameter(vectors: WeightVectors, loop: Loop) -> None:
    assert vectors.loop() == loop


def test_loop_follows_memory_order() -> None:
    filters = torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last)
    assert WeightVectors((1, 2, 3), shape=(8, 3, 5, 5)).loop(filters.stride()) == Loop(8, 75, 1, 1)
    assert WeightVectors((0, 2, 3), shape=(8, 3, 5, 5)).loop(filters.stride()) == Loop(1, 200, 3, 1)
    assert WeightVectors((1,), shape=(3, 8)).loop((1, 3)) == Loop(1, 8, 3, 1)
    assert WeightVectors((1,), shape=(3, 8)).loop((0, 1)) is None
    assert WeightVectors((1,), shape=(3, 8)).loop((9, 1)) is None


@given(case=cases(dtypes=(torch.float64,)))
def test_loop_visits_the_same_weight_vectors_as_the_view(case: Case) -> None:
    tensor, vectors = case.tensor, case.vectors.for_shape(case.tensor.shape)
    loop = vectors.loop(tensor.stride())
    if loop is None:
        return
    group, a, unit, b = loop
    assert (group * unit, a * b) == (vectors.count, vectors.fan_in)
    in_memory = tensor.as_strided((tensor.numel(),), (1,))
    by_loop = in_memory.reshape(group, a, unit, b).mean((1, 3)).flatten().sort().values
    by_view = tensor.reshape(vectors.dims).mean(vectors.span).flatten().sort().values
    torch.testing.assert_close(by_loop, by_view)


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
