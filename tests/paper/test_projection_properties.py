"""Eq. 3 and the first part of theorem 4.2 hold for any network, and a wrong projection violates them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcentral import WeightVectors
from gradcentral.paper import loss_lipschitzness, projection_identities, theorem_4_2
from tests.paper.networks import batch, holding, mse, network


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_identities_and_theorem_4_2_hold_for_any_network(seed: int, dtype: torch.dtype) -> None:
    model, data = network(seed).to(dtype), batch(dtype)
    assert holding(projection_identities(model, mse, data)) == [True] * 3
    assert holding(loss_lipschitzness(model, mse, data)) == [True] * 2


@pytest.mark.parametrize(
    ("wrong", "identities", "lengths"),
    [
        # Too little of the mean is removed: P² ≠ P, eᵀP ≠ 0, Pythagoras fails.
        (lambda g, v: g - 0.9 * g.mean(_own(g), keepdim=True), [False, True, False], [True, False]),
        # Too much of the mean is removed: the gradient is also longer.
        (lambda g, v: g - 3.0 * g.mean(_own(g), keepdim=True), [False, True, False], [False, False]),
        # The mean of other elements is removed: also P ≠ Pᵀ.
        (lambda g, v: g - g.mean(-1, keepdim=True).flip(0), [False, False, False], [False, False]),
    ],
)
def test_a_wrong_projection_is_detected(
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Tensor, WeightVectors], Tensor],
    identities: list[bool],
    lengths: list[bool],
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    data = torch.rand(8, 6), torch.randn(8, 3)
    monkeypatch.setattr(theorem_4_2, "center", wrong)
    assert holding(projection_identities(model, mse, data)) == identities
    assert holding(loss_lipschitzness(model, mse, data)) == lengths


def _own(g: Tensor) -> tuple[int, ...]:
    return tuple(range(1, g.ndim))


def test_centering_over_the_wrong_axis_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorem_4_2, "center", lambda g, v: g - g.mean(0, keepdim=True))
    model = nn.Linear(6, 4)
    idempotent, _, mean_zero = projection_identities(model, mse, (torch.rand(8, 6), torch.randn(8, 4)))
    assert idempotent.holds  # it is a projection, but onto another subspace
    assert not mean_zero.holds


def test_loss_lipschitzness_equals_a_hand_computed_ratio() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    # ∇L = −2(3, 1), whose component along e is (−4, −4).
    data = torch.tensor([[3.0, 1.0]]).double(), torch.ones(1, 1).double()
    shorter, _ = loss_lipschitzness(model, mse, data)
    assert shorter.value == pytest.approx(math.sqrt(8 / 40))
    assert shorter.where == "weight, unit 0; all together 0.447"


def test_a_model_without_weight_vectors_or_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is centered"):
        projection_identities(nn.LayerNorm(4), mse, batch())
    with pytest.raises(ValueError, match="none of the parameters that it centers requires a gradient"):
        loss_lipschitzness(network().requires_grad_(False), mse, batch())
