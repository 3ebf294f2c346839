"""Φ, P and their properties (section 3 of the paper), over random shapes, dtypes and strides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcentral import WeightVectors, center, projection_matrix, share
from gradcentral.projection import center_, center_regularized, restore_means_, unit_means
from tests.strategies import COMPLEX, FLOATING, Case, cases

DOUBLE = (torch.float64,)


def _close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("fan_in", [1, 2, 9, 64])
def test_projection_matrix_is_symmetric_and_idempotent_and_maps_e_to_zero(fan_in: int) -> None:
    P = projection_matrix(fan_in, dtype=torch.float64)
    e = torch.full((fan_in,), 1 / math.sqrt(fan_in), dtype=torch.float64)
    _close(P, torch.eye(fan_in, dtype=torch.float64) - torch.outer(e, e))
    _close(P @ P, P)
    _close(P.T, P)
    _close(e @ P, torch.zeros_like(e))


def test_projection_matrix_of_an_empty_weight_vector_raises() -> None:
    with pytest.raises(ValueError, match="fan_in must be at least 1"):
        projection_matrix(0)


@given(fan_in=st.integers(1, 30), units=st.integers(1, 5))
def test_center_is_multiplication_by_P(fan_in: int, units: int) -> None:
    g = torch.randn(units, fan_in, dtype=torch.float64)
    _close(center(g, WeightVectors((1,))), g @ projection_matrix(fan_in, dtype=torch.float64))
    _close(center(g.T, WeightVectors((0,))), projection_matrix(fan_in, dtype=torch.float64) @ g.T)


@given(case=cases(DOUBLE + COMPLEX[:1]))
def test_center_is_idempotent(case: Case) -> None:
    once = center(case.tensor, case.vectors)
    _close(center(once, case.vectors), once)


@given(case=cases(DOUBLE), scale=st.floats(-3, 3))
def test_center_is_linear(case: Case, scale: float) -> None:
    other = torch.randn_like(case.tensor)
    combined = center(case.tensor + scale * other, case.vectors)
    _close(combined, center(case.tensor, case.vectors) + scale * center(other, case.vectors))


@given(case=cases(DOUBLE))
def test_center_is_self_adjoint(case: Case) -> None:
    other = torch.randn_like(case.tensor)
    left = (center(case.tensor, case.vectors) * other).sum()
    _close(left, (case.tensor * center(other, case.vectors)).sum(), atol=1e-10)


@given(case=cases(DOUBLE + COMPLEX[:1]))
def test_centered_weight_vectors_have_zero_mean(case: Case) -> None:
    means = unit_means(center(case.tensor, case.vectors), case.vectors)
    _close(means, torch.zeros_like(means))


@given(case=cases(DOUBLE + COMPLEX[:1]))
def test_center_does_not_increase_the_norm(case: Case) -> None:
    assert center(case.tensor, case.vectors).norm() <= case.tensor.norm() * (1 + 1e-12)


@given(units=st.integers(1, 6), fan_in=st.integers(1, 9), seed=st.integers(0, 100))
def test_center_commutes_with_permutations_of_the_units(units: int, fan_in: int, seed: int) -> None:
    g = torch.randn(units, fan_in)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    rows = WeightVectors((1,))
    assert torch.equal(center(g[order], rows), center(g, rows)[order])


@given(case=cases(FLOATING + COMPLEX))
def test_center_equals_the_float64_result_rounded_to_the_dtype(case: Case) -> None:
    tensor, vectors = case
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    centered = center(tensor, vectors)
    assert centered.dtype == tensor.dtype
    assert centered.shape == tensor.shape
    rounding = torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
    _close(centered.to(wide.dtype), center(wide, vectors), atol=2 * rounding)


@given(case=cases(FLOATING + COMPLEX, expanded=False))
def test_center_in_place_equals_center(case: Case) -> None:
    expected = center(case.tensor, case.vectors)
    strides, storage = case.tensor.stride(), case.tensor.data_ptr()
    result = center_(case.tensor, case.vectors)
    assert result is case.tensor
    assert (result.stride(), result.data_ptr()) == (strides, storage)
    assert torch.equal(result, expected)


def test_center_in_place_works_where_the_strides_do_not_allow_the_view() -> None:
    columns = torch.randn(4, 6).T
    merged = WeightVectors((1,), view=(2, 12))
    expected = center(columns, merged)
    assert torch.equal(center_(columns, merged), expected)


def test_center_in_place_raises_where_elements_share_memory() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        center_(torch.ones(1, 3).expand(2, 3), WeightVectors((1,)))


@given(case=cases(DOUBLE + COMPLEX[:1]), l2=st.floats(-2, 2))
def test_center_regularized_centers_the_sum(case: Case, l2: float) -> None:
    """Placement "regularized": g′ + λw = P(g + λw)."""
    g, vectors = case
    w = torch.randn_like(g)
    _close(center_regularized(g, w, l2, vectors) + l2 * w, center(g + l2 * w, vectors))


def test_center_regularized_without_weight_decay_does_not_read_the_weights() -> None:
    g, rows = torch.randn(2, 3), WeightVectors((1,))
    assert torch.equal(center_regularized(g, torch.full((2, 3), torch.inf), 0.0, rows), center(g, rows))


@given(case=cases(DOUBLE + COMPLEX[:1], expanded=False))
def test_restore_means_adds_the_centered_change(case: Case) -> None:
    """Placement "update": restore_means_(w + Δw) = w + Φ(Δw)."""
    w, vectors = case
    change = torch.randn_like(w)
    updated = w + change
    restored = restore_means_(updated, unit_means(w, vectors), vectors)
    assert restored is updated
    _close(restored, w + center(change, vectors))


@given(case=cases(DOUBLE + COMPLEX[:1], expanded=False), steps=st.integers(1, 5))
def test_restore_means_keeps_the_constraint_over_steps(case: Case, steps: int) -> None:
    """The constraint is eᵀ(w − w⁰) = 0 (eq. 4)."""
    start, vectors = case
    w = start.clone()
    for _ in range(steps):
        w = restore_means_(w + torch.randn_like(w), unit_means(w, vectors), vectors)
    _close(unit_means(w - start, vectors), torch.zeros_like(unit_means(start, vectors)))


@given(case=cases(DOUBLE + COMPLEX[:1], expanded=False))
def test_restore_means_is_idempotent(case: Case) -> None:
    means = unit_means(torch.randn_like(case.tensor), case.vectors)
    once = restore_means_(case.tensor.clone(), means, case.vectors)
    _close(restore_means_(once.clone(), means, case.vectors), once)


@given(case=cases(FLOATING + COMPLEX, expanded=False))
def test_restoring_zero_means_is_centering(case: Case) -> None:
    expected = center(case.tensor, case.vectors)
    zeros = torch.zeros_like(unit_means(case.tensor, case.vectors))
    assert torch.equal(restore_means_(case.tensor, zeros, case.vectors), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_in_half_precision_neither_overflow_nor_stagnate(dtype: torch.dtype) -> None:
    # A float16 sum overflows at 100 × 4096, and a bfloat16 sum stops growing at 256 times its terms.
    g = torch.full((1, 4096), 100.0, dtype=dtype)
    assert torch.equal(center(g, WeightVectors((1,))), torch.zeros_like(g))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_weight_vector(bad: float) -> None:
    g = torch.randn(3, 5)
    clean = center(g, WeightVectors((1,)))
    g[1, 2] = bad
    centered = center(g, WeightVectors((1,)))
    assert torch.equal(centered[[0, 2]], clean[[0, 2]])
    assert not centered[1].isfinite().any()


def test_center_has_first_and_second_derivatives() -> None:
    vectors = WeightVectors((1, 3), view=(2, 2, 3, 2))
    g = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: center(t, vectors), (g,))
    assert torch.autograd.gradgradcheck(lambda t: center(t, vectors).pow(3), (g,))


def test_center_and_share_accept_a_pattern() -> None:
    g, filters = torch.randn(4, 3, 2, 2), WeightVectors((1, 2, 3))
    assert torch.equal(center(g, "o [i k k]"), center(g, filters))
    assert torch.equal(share(g, "o [i k k]"), share(g, filters))


@given(case=cases(DOUBLE))
def test_share_is_the_fraction_of_energy_that_centering_removes(case: Case) -> None:
    kept = center(case.tensor, case.vectors).square().sum() / case.tensor.square().sum()
    _close(share(case.tensor, case.vectors), 1 - kept)


@given(case=cases(DOUBLE))
def test_centering_removes_the_energy_along_e(case: Case) -> None:
    """For each weight vector, ‖Φ(g)‖² = ‖g‖² − (eᵀg)² (theorem 4.2)."""
    vectors = case.vectors.for_shape(case.tensor.shape)
    rows = case.tensor.reshape(vectors.dims)
    energy = rows.square().sum(vectors.span)
    along_e = vectors.fan_in * rows.mean(vectors.span).square()
    centered = center(case.tensor, vectors).reshape(vectors.dims).square().sum(vectors.span)
    _close(centered, energy - along_e, atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1.0, 1.0, 1.0]], 1.0), ([[1.0, -1.0]], 0.0), ([[0.0, 0.0]], 0.0), ([[3.0, 1.0]], 0.8)],
)
def test_share_of_known_gradients(rows: list[list[float]], expected: float) -> None:
    assert share(torch.tensor(rows), WeightVectors((1,))).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "dtype torch.int64"),
        (torch.eye(2).to_sparse(), ValueError, "sparse"),
        (torch.zeros(3), ValueError, "out of range"),
    ],
)
def test_tensors_that_cannot_be_centered_raise(tensor: torch.Tensor, error: type[Exception], message: str) -> None:
    for operation in (center, center_, share):
        with pytest.raises(error, match=message):
            operation(tensor, WeightVectors((1,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
def test_share_does_not_depend_on_the_scale_of_the_gradient(dtype: torch.dtype, scale: float) -> None:
    g = torch.tensor([[1.0, 1.0, 2.0], [1.0, -1.0, 4.0]], dtype=dtype)
    assert share(g * scale, "o [i]").item() == pytest.approx(share(g, "o [i]").item(), rel=1e-2)
    assert share(torch.full_like(g, scale), "o [i]").item() == pytest.approx(1)


def test_share_is_nan_for_gradients_that_are_not_finite_and_0_for_empty_ones() -> None:
    assert share(torch.tensor([[math.inf, 1.0]]), "o [i]").isnan()
    assert share(torch.tensor([[math.nan, 1.0]]), "o [i]").isnan()
    assert share(torch.zeros(0, 3), WeightVectors((1,))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_mean_of_huge_numbers_does_not_overflow(dtype: torch.dtype) -> None:
    g = torch.tensor([[3e38, 3e38, 3e38], [3e38, -3e38, 3e38]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0, 0.0], [2e38, -4e38, 2e38]]).to(dtype)  # -4e38 is -inf in float32
    torch.testing.assert_close(center(g, "o [i]").real, expected.real)
    assert float(unit_means(g[:1], WeightVectors((1,))).real) == pytest.approx(3e38)
