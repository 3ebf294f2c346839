"""The loop over the weight vectors of a parameter, in memory order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from gradcentral import WeightVectors
from gradcentral.kernels.loops import Loop, loop_of_vectors
from tests.strategies import Case, cases


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
    assert loop_of_vectors(vectors) == loop


def test_loop_follows_memory_order() -> None:
    filters = torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last)
    assert loop_of_vectors(WeightVectors((1, 2, 3), shape=(8, 3, 5, 5)), filters.stride()) == Loop(8, 75, 1, 1)
    assert loop_of_vectors(WeightVectors((0, 2, 3), shape=(8, 3, 5, 5)), filters.stride()) == Loop(1, 200, 3, 1)
    assert loop_of_vectors(WeightVectors((1,), shape=(3, 8)), (1, 3)) == Loop(1, 8, 3, 1)
    assert loop_of_vectors(WeightVectors((1,), shape=(3, 8)), (0, 1)) is None
    assert loop_of_vectors(WeightVectors((1,), shape=(3, 8)), (9, 1)) is None


@given(case=cases(dtypes=(torch.float64,)))
def test_loop_visits_the_same_weight_vectors_as_the_view(case: Case) -> None:
    tensor, vectors = case.tensor, case.vectors.for_shape(case.tensor.shape)
    loop = loop_of_vectors(vectors, tensor.stride())
    if loop is None:
        return
    group, a, unit, b = loop
    assert (group * unit, a * b) == (vectors.count, vectors.fan_in)
    in_memory = tensor.as_strided((tensor.numel(),), (1,))
    by_loop = in_memory.reshape(group, a, unit, b).mean((1, 3)).flatten().sort().values
    by_view = tensor.reshape(vectors.dims).mean(vectors.span).flatten().sort().values
    torch.testing.assert_close(by_loop, by_view)
