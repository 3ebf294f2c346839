"""∇²L equals closed forms, finite differences and torch.func; its largest eigenvalue equals that of torch.linalg."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gradcentral import center, projection_matrix, weight_layout
from gradcentral.paper.hessian import (
    hessian_matrix,
    hessian_vector_product,
    lanczos,
    projected_norm,
    top_eigenvalue,
)

mse = nn.functional.mse_loss
Pair = tuple[Tensor, Tensor]


class Quadratic(nn.Module):
    """A model whose output is ½ wᵀAw for any input."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(len(A), dtype=A.dtype))
        self.A = A

    def forward(self, _: object) -> Tensor:
        return self.w @ self.A @ self.w / 2


def itself(output: Tensor, _: object) -> Tensor:
    return output


def symmetric(n: int, seed: int) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + A.T


def network(seed: int = 0) -> tuple[nn.Module, Pair]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    return model, (torch.randn(5, 2, 4, 4).double(), torch.randn(5, 4).double())


def small(seed: int) -> tuple[nn.Module, Pair]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).double()
    return model, (torch.randn(7, 4).double() + 1, torch.randn(7, 2).double())


def loss_at(model: nn.Module, batch: Pair) -> Callable[..., Tensor]:
    names = [name for name, _ in model.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        return mse(functional_call(model, dict(zip(names, weights, strict=True)), (batch[0],)), batch[1])

    return loss


def test_hessian_of_a_quadratic_is_its_matrix() -> None:
    A = symmetric(6, seed=0)
    model = Quadratic(A)
    v = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(hessian_vector_product(model, itself, (0, 0), {model.w: v})[model.w], A @ v)
    torch.testing.assert_close(hessian_matrix(model, itself, (0, 0)), A)
    torch.testing.assert_close(hessian_matrix(model, itself, (0, 0), elements=[4, 1]), A[[4, 1]][:, [4, 1]])


def test_hessian_of_linear_regression_is_the_second_moment_of_the_input() -> None:
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    model = nn.Linear(3, 2, bias=False).double()

    def half_squares(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / (2 * len(target))

    expected = torch.block_diag(x.T @ x / 20, x.T @ x / 20)
    torch.testing.assert_close(hessian_matrix(model, half_squares, (x, y)), expected)


@pytest.mark.parametrize("make", [lambda: network(), lambda: small(0)])
def test_product_equals_the_finite_difference_of_the_gradient(make: Callable[[], tuple[nn.Module, Pair]]) -> None:
    model, batch = make()
    vector = {p: torch.randn_like(p) for p in model.parameters()}
    product = hessian_vector_product(model, mse, batch, vector)
    h, sides = 1e-5, []
    for sign in (1, -1):
        weights = [(p + sign * h * vector[p]).detach().requires_grad_() for p in model.parameters()]
        sides.append(torch.autograd.grad(loss_at(model, batch)(*weights), weights))
    for p, plus, minus in zip(model.parameters(), *sides, strict=True):
        torch.testing.assert_close(product[p], (plus - minus) / (2 * h), rtol=1e-6, atol=1e-8)


def test_matrix_equals_that_of_torch_func() -> None:
    model, batch = small(1)
    weights = tuple(model.parameters())
    every = tuple(range(len(weights)))
    blocks = torch.func.jacrev(torch.func.jacrev(loss_at(model, batch), every), every)(*weights)
    expected = torch.cat(
        [torch.cat([b.reshape(w.numel(), -1) for b in row], dim=1) for row, w in zip(blocks, weights, strict=True)]
    )
    H = hessian_matrix(model, mse, batch)
    torch.testing.assert_close(H, expected.detach())
    last = [*model.parameters()][2]
    torch.testing.assert_close(hessian_matrix(model, mse, batch, parameters=[last]), expected.detach()[15:21, 15:21])


def test_derivative_of_the_centered_gradient_is_P_times_the_hessian() -> None:
    model, batch = small(2)
    layout = weight_layout(model)
    first = next(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    loss, rest = loss_at(model, batch), [p.detach() for p in model.parameters()][1:]

    def centered_gradient(w: Tensor) -> Tensor:
        return center(torch.func.grad(lambda w: loss(w, *rest))(w), layout[first])

    jacobian = torch.func.jacrev(centered_gradient)(first.detach()).reshape(12, 12)
    P = torch.block_diag(*[projection_matrix(4, dtype=torch.float64)] * 3)
    assert names[0] == "0.weight"
    torch.testing.assert_close(jacobian, P @ hessian_matrix(model, mse, batch, parameters=[first]))


@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_top_eigenvalue_and_norm_equal_those_of_the_exact_matrices(seed: int) -> None:
    model, batch = small(seed)
    layout = weight_layout(model)
    H = hessian_matrix(model, mse, batch)
    one = torch.eye(3, dtype=torch.float64)
    P4, P3 = projection_matrix(4, dtype=torch.float64), projection_matrix(3, dtype=torch.float64)
    P = torch.block_diag(P4, P4, P4, one, P3, P3, one[:2, :2])
    within = torch.linalg.eigvalsh(P @ H @ P)
    top = torch.linalg.eigvalsh(H)
    exact: dict[str, float] = {
        "H": float(top[top.abs().argmax()]),
        "PH": float(torch.linalg.matrix_norm(P @ H, 2)),
        "PHP": float(within[within.abs().argmax()]),
    }
    found = {
        "H": top_eigenvalue(model, mse, batch, tolerance=1e-8),
        "PH": projected_norm(model, mse, batch, layout, tolerance=1e-8),
        "PHP": top_eigenvalue(model, mse, batch, layout=layout, tolerance=1e-8),
    }
    for name, eigenvalue in found.items():
        assert eigenvalue.converged
        assert eigenvalue.value == pytest.approx(exact[name], rel=1e-6)
    # Theorem 4.2; the inequality is strict here because the inputs have a nonzero mean.
    assert abs(exact["PHP"]) <= exact["PH"] * (1 + 1e-12)
    assert exact["PH"] < abs(exact["H"])


def test_top_eigenvalue_keeps_its_sign() -> None:
    model = Quadratic(torch.diag(torch.tensor([1.0, -7.0, 3.0], dtype=torch.float64)))
    assert top_eigenvalue(model, itself, (0, 0), tolerance=1e-9).value == pytest.approx(-7)


@given(n=st.integers(1, 25), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_lanczos_finds_the_largest_absolute_eigenvalue(n: int, seed: int) -> None:
    A = symmetric(n, seed)
    values = torch.linalg.eigvalsh(A)
    found = lanczos(A.mv, torch.randn(n, dtype=torch.float64), tolerance=1e-10, max_iterations=n)
    assert found.value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-8)


def test_an_unfinished_lanczos_reports_it_and_its_residual_bounds_the_error() -> None:
    A = symmetric(80, seed=3)
    values = torch.linalg.eigvalsh(A)
    found = lanczos(A.mv, torch.randn(80, dtype=torch.float64), tolerance=1e-8, max_iterations=6)
    assert not found.converged
    assert found.iterations == 6
    assert found.residual > 1e-8 * abs(found.value)
    assert float((values - found.value).abs().min()) <= found.residual


def test_lanczos_stops_when_the_krylov_space_is_exhausted() -> None:
    nothing = lanczos(torch.zeros(4, 4).mv, torch.ones(4), tolerance=1e-6, max_iterations=9)
    assert nothing == (0.0, 0.0, 1, True)
    identity = lanczos(torch.eye(4).mv, torch.ones(4), tolerance=1e-6, max_iterations=9)
    assert identity.value == pytest.approx(1)
    assert identity.iterations == 1
    assert lanczos(torch.eye(4).mv, torch.zeros(4), tolerance=1e-6, max_iterations=9).value == 0


def test_lanczos_does_not_converge_to_nan() -> None:
    found = lanczos(lambda v: v * math.nan, torch.ones(4), tolerance=1e-6, max_iterations=9)
    assert math.isnan(found.value)
    assert not found.converged


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    model = nn.Linear(3, 2)

    def mean(output: Tensor, _: object) -> Tensor:
        return output.mean()

    assert not hessian_matrix(model, mean, (torch.randn(4, 3), None)).any()
    assert top_eigenvalue(model, mean, (torch.randn(4, 3), None)).value == 0


def test_parameters_that_the_loss_does_not_depend_on_have_no_curvature() -> None:
    class HalfUsed(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            used: Tensor = self["used"](x)
            return used

    model = HalfUsed({"used": nn.Linear(2, 1, bias=False), "unused": nn.Linear(2, 1, bias=False)})
    H = hessian_matrix(model, mse, (torch.randn(5, 2), torch.randn(5, 1)))
    assert H[:2, :2].any()
    assert not H[2:].any()
    assert not H[:, 2:].any()


def test_attention_is_differentiated_twice() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double()
    batch = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 8).double()
    weight = model.self_attn.in_proj_weight
    v = torch.randn_like(weight)
    product = hessian_vector_product(model, mse, batch, {weight: v})[weight]
    h, sides = 1e-5, []
    start = weight.detach().clone()
    for sign in (1, -1):
        weight.data = start + sign * h * v
        sides.append(torch.autograd.grad(mse(model(batch[0]), batch[1]), weight)[0])
    torch.testing.assert_close(product, (sides[0] - sides[1]) / (2 * h), rtol=1e-5, atol=1e-9)


def test_model_gradients_buffers_and_random_numbers_are_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[3].eval()
    batch = torch.randn(6, 3), torch.randn(6, 2)
    mse(model(batch[0]), batch[1]).backward()
    gradients = [p.grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = top_eigenvalue(model, mse, batch)
    projected_norm(model, mse, batch, weight_layout(model))
    hessian_matrix(model, mse, batch, elements=[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert top_eigenvalue(model, mse, batch) == first
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_bad_arguments_are_refused_by_name() -> None:
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    stranger = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="parameters: empty"):
        top_eigenvalue(model, mse, batch, parameters=[])
    with pytest.raises(ValueError, match=r"shape \(2,\) is not a parameter of the model"):
        hessian_matrix(model, mse, batch, parameters=[stranger])
    with pytest.raises(ValueError, match=r"0.weight has shape \(2, 3\), its part \(3,\)"):
        hessian_vector_product(model, mse, batch, {layer.weight: torch.zeros(3)})
    with pytest.raises(ValueError, match="tolerance must be positive"):
        top_eigenvalue(model, mse, batch, tolerance=0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1"):
        top_eigenvalue(model, mse, batch, max_iterations=0)
    with pytest.raises(TypeError, match="weight is complex"):
        top_eigenvalue(nn.Linear(2, 1, dtype=torch.complex64), mse, batch)


def test_the_suggested_layout_centers_the_parameters() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match="layout: none of the parameters is centered") as caught:
        projected_norm(model, mse, batch, weight_layout(nn.Linear(3, 2)))
    layout = eval(str(caught.value).partition("give ")[2], {"weight_layout": weight_layout, "model": model})
    assert projected_norm(model, mse, batch, layout).converged


def test_a_frozen_parameter_is_refused_with_two_remedies_that_work() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="bias does not require a gradient") as caught:
        top_eigenvalue(model, mse, batch, parameters=model.parameters())
    assert "exclude it" in str(caught.value)
    assert top_eigenvalue(model, mse, batch, parameters=[model.weight]).converged
    call = re.search(r"call (requires_grad_\(\))", str(caught.value))
    assert call is not None
    eval(f"model.bias.{call[1]}", {"model": model})
    assert top_eigenvalue(model, mse, batch, parameters=model.parameters()).converged


@pytest.mark.parametrize("sparse", [True, False])
def test_sparse_embedding_tables_are_differentiated_like_dense_ones(sparse: bool) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(5, 2, sparse=sparse)
    model = nn.Sequential(table, nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)).double()
    ids, y = torch.randint(0, 5, (6, 2)), torch.randn(6, 3).double()
    H = hessian_matrix(model, mse, (ids, y))
    weights = tuple(model.parameters())
    every = tuple(range(3))
    table.sparse = False
    blocks = torch.func.jacrev(torch.func.jacrev(loss_at(model, (ids, y)), every), every)(*weights)
    expected = torch.cat(
        [torch.cat([b.reshape(w.numel(), -1) for b in row], dim=1) for row, w in zip(blocks, weights, strict=True)]
    )
    torch.testing.assert_close(H, expected.detach())
    top = top_eigenvalue(model, mse, (ids, y), tolerance=1e-6)
    assert abs(top.value) == pytest.approx(float(torch.linalg.eigvalsh(H).abs().max()), rel=1e-5)


def test_a_batch_may_be_a_mapping() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    model = Named()
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    named = hessian_matrix(model, lambda output, batch: mse(output, batch["y"]), {"x": x, "y": y})
    torch.testing.assert_close(named, hessian_matrix(model.layer, mse, (x, y)))


@pytest.mark.parametrize("larger", [-1.0, 1.0])
def test_lanczos_finds_the_larger_of_two_ends_of_nearly_equal_absolute_value(larger: float) -> None:
    # The larger end is crowded and the starting vector has small components there, so the smaller end converges first.
    crowd = torch.linspace(0.9, 1.003, 30)
    A = larger * torch.cat([crowd, torch.tensor([-1.0]), torch.linspace(-0.5, 0.5, 200)]).double()
    start = torch.ones_like(A)
    start[:30] = 0.03
    found = lanczos(lambda v: A * v, start, tolerance=1e-3, max_iterations=100)
    assert found.converged
    assert found.value == pytest.approx(larger * 1.003, rel=1e-3)


def test_half_precision_models_use_a_single_precision_basis() -> None:
    model, batch = small(3)
    data = (batch[0].bfloat16(), batch[1].bfloat16())
    exact = top_eigenvalue(model, mse, batch)
    found = top_eigenvalue(model.bfloat16(), mse, data)
    assert found.converged
    assert found.value == pytest.approx(exact.value, rel=0.05)
