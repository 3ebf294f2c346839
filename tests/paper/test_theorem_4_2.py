"""The curvature part of theorem 4.2 agrees with hand-computed Hessians, up to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradcentral.paper import gradient_lipschitzness, theorem_4_2
from tests.paper.networks import holding, mse


@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_gradient_lipschitzness_holds_for_small_networks(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = gradient_lipschitzness(model, mse, (torch.rand(9, 4).double(), torch.randn(9, 3).double()))
    assert holding(found) == [True] * 3
    assert found[2].value <= found[1].value * 1.01


def test_gradient_lipschitzness_equals_hand_computed_norms() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    data = torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 1).double()
    # ∇²L = 2xxᵀ, x = (1, 2): ‖∇²L‖ = 10, ‖P∇²L‖ = 2‖Px‖‖x‖ = √10, ‖P∇²LP‖ = 2‖Px‖² = 1.
    exact, projected, within = gradient_lipschitzness(model, mse, data, tolerance=1e-9)
    assert exact.value == pytest.approx(math.sqrt(10) / 10)
    assert projected.value == pytest.approx(math.sqrt(10))
    assert within.value == pytest.approx(1)
    assert projected.bound == within.bound == pytest.approx(10)


def test_a_projection_that_stretches_the_hessian_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorem_4_2, "projection_matrix", lambda n, dtype, device: 2 * torch.eye(n, dtype=dtype))
    exact, *_ = gradient_lipschitzness(nn.Linear(4, 2), mse, (torch.rand(9, 4), torch.randn(9, 2)))
    assert not exact.holds
    assert exact.value == pytest.approx(2)


def test_large_weight_vectors_are_measured_only_by_the_iteration() -> None:
    data = torch.rand(9, 30), torch.randn(9, 2)
    model = nn.Sequential(nn.Linear(30, 4), nn.Linear(4, 2))
    exact, *_ = gradient_lipschitzness(model, mse, data, largest_fan_in=10)
    assert exact.where.endswith("1 of 2 parameters measured")
    assert len(gradient_lipschitzness(model, mse, data, largest_fan_in=2)) == 2


def test_bounds_of_the_curvature_leave_room_for_rounding() -> None:
    """After a LayerNorm, P∇²L = ∇²L, so both norms are equal up to rounding."""
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2, bias=False))
        data = torch.randn(16, 4), torch.randn(16, 2)
        _, *whole = gradient_lipschitzness(model, mse, data)
        for measured in whole:
            assert measured.holds, (seed, measured)
            assert "16 eps(float32)" in measured.allowance
            assert measured.bound < measured.value * 1.01


def test_opposite_ends_of_the_spectrum_are_not_confused() -> None:
    """The ends of this spectrum, −2.547 and 2.570, have nearly the same absolute value."""
    torch.manual_seed(110)
    norm = nn.LayerNorm(16, elementwise_affine=False)
    model = nn.Sequential(
        norm, nn.Linear(16, 16), nn.Tanh(), norm, nn.Linear(16, 16), nn.Tanh(), norm, nn.Linear(16, 16)
    )
    assert holding(gradient_lipschitzness(model, mse, (torch.randn(32, 16), torch.randn(32, 16)))) == [True] * 3
