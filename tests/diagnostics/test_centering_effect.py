from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from gradcentral import WeightVectors, center
from gradcentral.diagnostics.centering_effect import combine_effects, effects
from tests.strategies import Case, cases

ROWS = WeightVectors(span=(1,))


@given(cases(dtypes=(torch.float64,)))
def test_effects_match_the_gradient_and_its_projection(case: Case) -> None:
    g, centered = case.tensor, center(*case)
    (effect,) = effects([case])
    assert effect.norm == pytest.approx(float(g.norm()))
    assert effect.centered_norm == pytest.approx(float(centered.norm()), abs=1e-12)
    assert effect.largest == float(g.abs().max())
    assert effect.centered_largest == pytest.approx(float(centered.abs().max()), abs=1e-12)
    assert effect.share == pytest.approx(1 - float(centered.norm() / g.norm()) ** 2, abs=1e-12)
    assert (
        effect.cosine
        == pytest.approx(float((g * centered).sum()) / (effect.norm * max(effect.centered_norm, 1e-300)), abs=1e-6)
        or effect.share > 1 - 1e-12
    )


def test_a_gradient_without_weight_vectors_is_not_changed() -> None:
    g = torch.tensor([[3.0, 4.0]])
    assert effects([(g, None)]) == [(0.0, 5.0, 5.0, 4.0, 4.0)]


def test_combined_effects_match_one_long_vector() -> None:
    a, b, bias = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.randn(7).double()
    whole = combine_effects(effects([(a, ROWS), (b, ROWS), (bias, None)]))
    g = torch.cat([a.flatten(), b.flatten(), bias])
    centered = torch.cat([center(a, ROWS).flatten(), center(b, ROWS).flatten(), bias])
    assert whole.norm == pytest.approx(float(g.norm()))
    assert whole.centered_norm == pytest.approx(float(centered.norm()))
    assert whole.share == pytest.approx(1 - float(centered.norm() / g.norm()) ** 2)
    assert whole.largest == float(g.abs().max())


def test_a_zero_gradient_has_share_zero_and_no_cosine() -> None:
    (effect,) = effects([(torch.zeros(2, 3), ROWS)])
    assert effect.share == 0
    assert math.isnan(effect.cosine)
    assert combine_effects([effect]).share == 0
    assert effects([]) == []


def test_half_precision_does_not_overflow() -> None:
    (effect,) = effects([(torch.full((1, 64), 300.0, dtype=torch.float16), ROWS)])
    assert effect.norm == pytest.approx(2400)
    assert effect.share == pytest.approx(1)


def test_sparse_gradients_are_read() -> None:
    g = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    assert effects([(g.to_sparse(), None)])[0].norm == pytest.approx(5)


def test_dtypes_can_be_mixed() -> None:
    first, second = effects([(torch.ones(1, 2), ROWS), (torch.ones(1, 2, dtype=torch.float64), ROWS)])
    assert first == pytest.approx(second)


def test_a_gradient_with_nan_or_inf_has_no_share() -> None:
    for bad in (math.nan, math.inf):
        (effect,) = effects([(torch.tensor([[1.0, bad]]), ROWS)])
        assert math.isnan(effect.share)
        assert math.isnan(effect.cosine)
        assert math.isnan(combine_effects([effect, effect]).share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e36])
def test_effects_scale_with_the_gradient(dtype: torch.dtype, scale: float) -> None:
    """The squares of these gradients do not fit into float32."""
    g = torch.tensor([[1.0, 2.0, 4.0], [-1.0, 1.0, 8.0]], dtype=dtype)
    for vectors in (ROWS, None):
        (small,), (scaled,) = effects([(g, vectors)]), effects([(g * scale, vectors)])
        assert scaled.share == pytest.approx(small.share, rel=1e-2)
        assert list(scaled[1:]) == pytest.approx([number * scale for number in small[1:]], rel=1e-2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_effects_of_a_gradient_that_is_not_finite_are_not_finite(value: float) -> None:
    for vectors in (ROWS, None):
        (effect,) = effects([(torch.tensor([[value, 1.0]]), vectors)])
        assert not math.isfinite(effect.norm)
        assert not math.isfinite(effect.centered_norm)
    (effect,) = effects([(torch.tensor([[value, 1.0]]), ROWS)])
    assert math.isnan(effect.share)
