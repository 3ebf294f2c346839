"""The statements hold where the paper says so, and the measurement notices where they do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightVectors, weight_layout
from gradcentral.experiment import Task, load_task
from gradcentral.initialization import initial_means
from gradcentral.paper import theorems
from gradcentral.paper.output_shift import intensity_responses
from gradcentral.paper.statements import Measured, worst
from gradcentral.paper.theorems import (
    centered_initialization,
    gradient_lipschitzness,
    hyperplane,
    initialization,
    intensity_shift,
    loss_lipschitzness,
    measure_all,
    projection_identities,
)

mse = nn.functional.mse_loss
SGD_FACTORY = partial(torch.optim.SGD, lr=0.1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 5)
    )


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(8, 2, 4, 4, dtype=dtype), torch.randn(8, 5, dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> nn.Module:
    input, target = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(input), target).backward()
        optimizer.step()
    return model


def holding(found: list[Measured]) -> list[bool]:
    return [measured.holds for measured in found]


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_identities_and_theorem_4_2_hold_of_any_network(seed: int, dtype: torch.dtype) -> None:
    model, data = network(seed).to(dtype), batch(dtype)
    assert holding(projection_identities(model, mse, data)) == [True] * 3
    assert holding(loss_lipschitzness(model, mse, data)) == [True] * 2


@pytest.mark.parametrize(
    ("wrong", "identities", "lengths"),
    [
        # Too little of the mean, too much, and that of other elements: P² ≠ P, Pᵀ ≠ P, eᵀP ≠ 0; longer, Pythagoras.
        (lambda g, v: g - 0.9 * g.mean(_own(g), keepdim=True), [False, True, False], [True, False]),
        (lambda g, v: g - 3.0 * g.mean(_own(g), keepdim=True), [False, True, False], [False, False]),
        (lambda g, v: g - g.mean(-1, keepdim=True).flip(0), [False, False, False], [False, False]),
    ],
)
def test_a_wrong_projection_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Tensor, WeightVectors], Tensor],
    identities: list[bool],
    lengths: list[bool],
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    data = torch.rand(8, 6), torch.randn(8, 3)
    monkeypatch.setattr(theorems, "center", wrong)
    assert holding(projection_identities(model, mse, data)) == identities
    assert holding(loss_lipschitzness(model, mse, data)) == lengths


def _own(g: Tensor) -> tuple[int, ...]:
    return tuple(range(1, g.ndim))


def test_centering_over_the_wrong_axis_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorems, "center", lambda g, v: g - g.mean(0, keepdim=True))
    model = nn.Linear(6, 4)
    idempotent, _, mean_zero = projection_identities(model, mse, (torch.rand(8, 6), torch.randn(8, 4)))
    assert idempotent.holds  # it is a projection, onto another space
    assert not mean_zero.holds


def test_loss_lipschitzness_is_pythagoras_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    # ∇L = −2(3, 1), of which (−4, −4) lies along e.
    data = torch.tensor([[3.0, 1.0]]).double(), torch.ones(1, 1).double()
    shorter, _ = loss_lipschitzness(model, mse, data)
    assert shorter.value == pytest.approx(math.sqrt(8 / 40))
    assert shorter.where == "weight, unit 0; all together 0.447"


@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_gradient_lipschitzness_holds_of_small_networks(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = gradient_lipschitzness(model, mse, (torch.rand(9, 4).double(), torch.randn(9, 3).double()))
    assert holding(found) == [True] * 3
    assert found[2].value <= found[1].value * 1.01


def test_gradient_lipschitzness_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    data = torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 1).double()
    # ∇²L = 2xxᵀ, x = (1, 2): ‖∇²L‖ = 10, ‖P∇²L‖ = 2‖Px‖‖x‖ = √10, ‖P∇²LP‖ = 2‖Px‖² = 1.
    exact, projected, within = gradient_lipschitzness(model, mse, data, tolerance=1e-9)
    assert exact.value == pytest.approx(math.sqrt(10) / 10)
    assert projected.value == pytest.approx(math.sqrt(10))
    assert within.value == pytest.approx(1)
    assert projected.bound == within.bound == pytest.approx(10)


def test_a_projection_that_stretches_the_hessian_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorems, "projection_matrix", lambda n, dtype, device: 2 * torch.eye(n, dtype=dtype))
    exact, *_ = gradient_lipschitzness(nn.Linear(4, 2), mse, (torch.rand(9, 4), torch.randn(9, 2)))
    assert not exact.holds
    assert exact.value == pytest.approx(2)


def test_large_weight_vectors_are_left_to_the_iteration() -> None:
    data = torch.rand(9, 30), torch.randn(9, 2)
    model = nn.Sequential(nn.Linear(30, 4), nn.Linear(4, 2))
    exact, *_ = gradient_lipschitzness(model, mse, data, largest_fan_in=10)
    assert exact.where.endswith("1 of 2 parameters looked at")
    assert len(gradient_lipschitzness(model, mse, data, largest_fan_in=2)) == 2


SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), **SGD), False),
        (lambda m: gradcentral.SGD(m, **SGD), True),
        (lambda m: gradcentral.SGD(m, **SGD, weight_decay=0.01), False),
        (lambda m: gradcentral.SGD(m, **SGD, weight_decay=0.01, placement="update"), True),
        (lambda m: gradcentral.AdamW(m, lr=0.01), False),
        (lambda m: gradcentral.AdamW(m, lr=0.01, placement="update"), True),
    ],
)
def test_training_stays_on_the_hyperplane_where_it_should(
    make: Callable[[nn.Module], torch.optim.Optimizer], stays: bool
) -> None:
    model = network()
    before = copy.deepcopy(model)
    train(model, make(model))
    on_plane = hyperplane(model, before, steps=10)
    shifted = intensity_shift(model, before, batch(), steps=10, gamma=0.5)
    assert on_plane.holds == shifted.holds == stays
    if not stays:
        assert on_plane.value > 5 * on_plane.bound


def test_hyperplane_is_the_sum_of_the_change_over_root_M() -> None:
    model = nn.Linear(4, 2).double()
    nn.init.ones_(model.weight)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[1] += torch.tensor([1.0, -1.0, 3.0, 1.0])
    found = hyperplane(model, before, steps=1)
    assert found.value == pytest.approx(4 / 2 / math.sqrt(2**2 + 0 + 4**2 + 2**2))
    assert found.where == "weight, unit 1"


def test_a_model_that_has_diverged_does_not_hold() -> None:
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[1, 2] = math.nan
    found = hyperplane(model, before, steps=1)
    assert math.isnan(found.value)
    assert not found.holds


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 5, padding=2, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 6, 1),
    ],
)
def test_every_unpadded_pixel_of_a_convolution_answers_by_its_initial_weights(layer: nn.Conv2d) -> None:
    model = layer
    before = copy.deepcopy(layer)
    optimizer = gradcentral.SGD(model, lr=0.1)
    x = torch.rand(3, 4, 9, 9)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().sum() / 100).backward()
        optimizer.step()
    (response,) = intensity_responses(model, before, (x, None), gamma=-0.7)
    # One pixel in the middle, by hand.
    middle = (0, slice(None), model(x).shape[2] // 2, model(x).shape[3] // 2)
    by_hand = (model(x - 0.7) - model(x)).detach()[middle].double()
    predicted = -0.7 * before.weight.detach().double().sum((1, 2, 3))
    assert not torch.allclose(model.weight, before.weight, atol=1e-3)
    torch.testing.assert_close(response.predicted, predicted)
    torch.testing.assert_close(by_hand, predicted, rtol=0, atol=1e-5)
    torch.testing.assert_close(response.measured, by_hand, rtol=0, atol=1e-5)
    assert float(response.error.max()) < 1e-5


@pytest.mark.parametrize("centered", [True, False])
def test_linear_units_answer_by_their_initial_weights_and_only_under_gc(centered: bool) -> None:
    layer = nn.Linear(6, 3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))
    before, initial = copy.deepcopy(model), layer.weight.detach().double()
    optimizer = gradcentral.SGD(model, lr=0.2) if centered else torch.optim.SGD(model.parameters(), lr=0.2)
    x, y = torch.rand(16, 5, 6), torch.randn(16, 5, 2)
    for _ in range(10):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    first, second = intensity_responses(model, before, (x, None), gamma=2.0)
    assert (first.name, second.name) == ("0.weight", "2.weight")
    by_hand = (layer(x + 2) - layer(x)).detach()[0, 0].double()
    torch.testing.assert_close(first.measured, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.predicted, 2 * initial.sum(1))
    assert bool((first.error < 1e-5).all()) == bool((second.error < 1e-5).all()) == centered


def test_training_with_a_wrong_axis_violates_theorem_4_1() -> None:
    model = nn.Linear(6, 6)
    before = copy.deepcopy(model)
    wrong = weight_layout(model, overrides={"weight": WeightVectors((0,))})
    optimizer = gradcentral.SGD(model.parameters(), lr=0.2, layout=wrong)
    x = torch.rand(16, 6)
    mse(model(x), torch.randn(16, 6)).backward()
    optimizer.step()
    assert not intensity_shift(model, before, (x, None), steps=1).holds
    assert hyperplane(model, before, steps=1, layout=wrong).holds


def test_layers_that_are_no_plain_product_are_not_measured() -> None:
    class Standardized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight / self.weight.std(), self.bias)

    own = Standardized(4, 4)
    model = nn.Sequential(own, nn.Linear(4, 3))
    (response,) = intensity_responses(model, copy.deepcopy(model), (torch.rand(2, 4), None))
    assert response.name == "1.weight"
    with pytest.raises(ValueError, match="no centered Linear or convolution"):
        intensity_responses(own, own, (torch.rand(2, 4), None))
    padded = nn.Conv2d(2, 3, 3, padding=1)
    with pytest.raises(ValueError, match="that no padding touches"):
        intensity_responses(padded, padded, (torch.rand(1, 2, 2, 2), None))


def test_initialization_notices_weights_with_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    assert holding(initialization(network())) == [True] * 4

    def biased(*args: Any, **kwargs: Any) -> Any:
        means = initial_means(*args, **kwargs)
        return means._replace(absolute=means.absolute + 5 * means.expected)

    monkeypatch.setattr(theorems, "initial_means", biased)
    assert holding(initialization(network())) == [False] * 4


def test_centered_initialization_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    assert centered_initialization(model).holds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(theorems, "center_weights_", lambda model, layout: layout)
    assert not centered_initialization(model).holds


def test_measure_all_of_the_digits_network_holds_and_training_without_gc_does_not() -> None:
    task = load_task("digits")
    assert isinstance(task, Task)
    data: Any = task.train
    x, y = data.tensors
    model = task.model()
    assert isinstance(model, nn.Sequential)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    batches = list(zip(x[:192].split(32), y[:192].split(32), strict=True))
    found = measure_all(model, task.loss, batches, task.optimizers["sgd"])
    assert [measured.formula for measured in found if not measured.holds] == []
    trained = [measured for measured in found if measured.without is not None]
    assert [measured.source for measured in trained] == ["section 4.1", "theorem 4.1"]
    for measured in trained:
        assert measured.without is not None
        assert measured.without > 100 * measured.bound
    assert torch.equal(torch.get_rng_state(), random)
    assert not model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measured_holds_up_to_its_bound_and_not_for_nan() -> None:
    def measured(value: float) -> Measured:
        return Measured("eq. 1", "", "", value, 1.0, "")

    assert [measured(value).holds for value in (0.5, 1.0, 1.1, math.nan)] == [True, True, False, False]


def test_worst_names_the_unit_and_takes_nan_for_the_largest() -> None:
    assert worst([("a", torch.tensor([1.0, 3.0])), ("b", torch.tensor([2.0]))]) == (3.0, "a, unit 1")
    value, where = worst([("a", torch.tensor([1.0])), ("b", torch.tensor([0.0, math.nan])), ("c", torch.tensor([9.0]))])
    assert math.isnan(value)
    assert where == "b, unit 1"
    with pytest.raises(ValueError, match="nothing to measure"):
        worst([])


def test_bad_arguments_are_refused_by_name() -> None:
    model, data = network(), batch()
    with pytest.raises(ValueError, match="nothing is centered"):
        projection_identities(nn.LayerNorm(4), mse, data)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        hyperplane(model, model, steps=0)
    with pytest.raises(ValueError, match="before: it has no such 0.weight"):
        hyperplane(model, nn.Linear(2, 3), steps=1)
    with pytest.raises(ValueError, match="before: it has no such 0.weight"):
        intensity_shift(model, nn.Linear(2, 3), data, steps=1)
    with pytest.raises(ValueError, match="gamma must not be 0"):
        intensity_shift(model, model, data, steps=1, gamma=0)
    with pytest.raises(ValueError, match="batches: give at least one"):
        measure_all(model, mse, [], torch.optim.SGD)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters that it centers needs a gradient"):
        loss_lipschitzness(model, mse, data)


def test_bounds_of_the_curvature_leave_room_for_rounding() -> None:
    """Behind a LayerNorm P∇²L = ∇²L, so that both norms are equal but for rounding."""
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2, bias=False))
        data = torch.randn(16, 4), torch.randn(16, 2)
        _, *whole = gradient_lipschitzness(model, mse, data)
        for measured in whole:
            assert measured.holds, (seed, measured)
            assert "16 eps(float32)" in measured.allowance
            assert measured.bound < measured.value * 1.01


def test_opposite_ends_of_the_spectrum_are_not_mistaken() -> None:
    """Its two ends, −2.547 and 2.570, are nearly as far out."""
    torch.manual_seed(110)
    norm = nn.LayerNorm(16, elementwise_affine=False)
    model = nn.Sequential(
        norm, nn.Linear(16, 16), nn.Tanh(), norm, nn.Linear(16, 16), nn.Tanh(), norm, nn.Linear(16, 16)
    )
    assert holding(gradient_lipschitzness(model, mse, (torch.randn(32, 16), torch.randn(32, 16)))) == [True] * 3


def test_the_optimizer_factory_may_look_at_its_parameters_twice() -> None:
    def decayed(params: Any) -> torch.optim.Optimizer:
        matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01}
        others = {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}
        assert others["params"]
        return torch.optim.SGD([matrices, others], lr=0.1)

    found = measure_all(nn.Linear(5, 2), mse, [(torch.rand(8, 5), torch.randn(8, 2))], decayed)
    assert all(holding(found))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_frozen_stays_so_while_the_copies_train(whole: bool) -> None:
    modes: list[bool] = []

    class Watched(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(input)

    model = nn.Sequential(nn.Linear(5, 4), Watched(4), nn.Linear(4, 2))
    # A model that is whole in evaluation mode is not frozen: its mode is that of its last use.
    (model if whole else model[1]).eval()
    measure_all(model, mse, [(torch.rand(8, 5), torch.randn(8, 2))] * 2, SGD_FACTORY)
    assert set(modes) == {whole}
    assert not model[1].training


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 4, 3), nn.Tanh(), nn.Flatten(1)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 12))),
        nn.Sequential(nn.Bilinear(2, 3, 12)),
    ],
)
def test_statements_about_plain_layers_are_left_out_and_said_to_be_where_there_is_none(model: nn.Sequential) -> None:
    if isinstance(model[0], nn.Bilinear):
        model.forward = lambda x: model[0](x[:, :2], x[:, 2:])  # type: ignore[method-assign]
    found = measure_all(model, mse, [(torch.rand(8, 5), torch.randn(8, 12))], SGD_FACTORY)
    assert all(holding(found))
    assert len(found) == 15 - 1 - 4
    assert [left.source for left in found.left_out] == ["theorem 4.1", "section 4.1"]
    for left in found.left_out:
        assert "no centered Linear or convolution" in left.reason


def test_the_curvature_is_left_out_where_torch_has_no_second_derivative() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    data = torch.randint(0, 10, (8, 3)), torch.randn(8, 2)
    found = measure_all(model, mse, [data], SGD_FACTORY)
    assert all(holding(found))
    (left,) = found.left_out
    assert left.source == "theorem 4.2"
    assert "_embedding_bag" in left.reason


def test_batches_may_be_mappings() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Outer()
    x, y = torch.rand(8, 5), torch.randn(8, 2)
    named = measure_all(model, lambda output, batch: mse(output, batch["y"]), [{"x": x, "y": y}] * 3, SGD_FACTORY)
    pairs = measure_all(nn.Sequential(model.inner), mse, [(x, y)] * 3, SGD_FACTORY)
    assert [(m.formula, m.value) for m in named] == [(m.formula, m.value) for m in pairs]


def test_batches_are_taken_as_the_copies_train_with_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.LayerNorm(8), nn.Linear(8, 2))
    outputs: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach())
        return mse(output, target)

    taken = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            taken.append(len(outputs))
            yield torch.rand(8, 5), torch.randn(8, 2)

    measure_all(model, loss, batches(), SGD_FACTORY)
    assert taken == [0, 2]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 2))
    message = r"model: 0\.weight is computed .* use torch\.nn\.utils\.parametrizations\.weight_norm"
    with pytest.raises(ValueError, match=message):
        measure_all(model, mse, [(torch.rand(8, 5), torch.randn(8, 2))], SGD_FACTORY)
    with pytest.raises(ValueError, match=message):
        centered_initialization(model)
