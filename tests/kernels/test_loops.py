"""The loop over the weight vectors of a parameter, in memory order."""

from __future__ import annotations

import math

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
        (WeightVectors((0,), shape=(1, 1)), Loop(1, 1, 1, 1)),
        # Transposed convolutions with a stride: k = s, k = 2s in two axes and in one of them, and two groups.
        (WeightVectors((0,), shape=(8, 3, 2, 2)), Loop(1, 8, 12, 1)),
        (WeightVectors((0, 2, 4), view=(8, 3, 2, 2, 2, 2), shape=(8, 3, 4, 4)), Loop(1, 8, 3, 16, (2, 2, 2, 2))),
        (WeightVectors((0, 3), view=(8, 3, 2, 2, 2), shape=(8, 3, 2, 4)), Loop(1, 8, 6, 4, (2, 2))),
        (WeightVectors((1, 3), view=(2, 4, 3, 2, 8), shape=(8, 3, 16)), Loop(2, 4, 3, 16, (2, 8))),
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
    assert math.prod(loop) == tensor.numel()
    assert loop.groups * loop.units * loop.phases == vectors.count
    firsts = loop.first_of_phase()
    in_memory = tensor.as_strided((tensor.numel(),), (1,)).reshape(*loop).sum(1)
    means = [in_memory[..., [first == one for first in firsts]].sum(-1) for one in sorted(set(firsts))]
    by_loop = (torch.stack(means) / vectors.fan_in).flatten().sort().values
    by_view = tensor.reshape(vectors.dims).mean(vectors.span).flatten().sort().values
    torch.testing.assert_close(by_loop, by_view)
