"""Infinite, NaN, subnormal and huge weights, gradients and states are handled as in torch's unfused step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightLayout, weight_layout
from gradcentral.optim.reference import AdamState, adam_step, sgd_step

INF = math.inf
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd l2": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "momentum, full dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 1.0}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd, lr 0": ("SGD", {"lr": 0.0, "momentum": 0.9}),
    "maximize": ("SGD", {"lr": 0.1, "maximize": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam l2": ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam, betas 0": ("Adam", {"lr": 0.01, "betas": (0.0, 0.0)}),
    "adam, small betas": ("Adam", {"lr": 0.01, "betas": (0.3, 0.3)}),
    "adam, epsilon 0": ("Adam", {"lr": 0.01, "eps": 0.0}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw, no decay": ("AdamW", {"lr": 0.01, "weight_decay": 0.0}),
}
STATES = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq")}


def combinations(dtype: torch.dtype, count: int, largest: float) -> list[Tensor]:
    """Return ``count`` tensors that together hold every combination of the special values."""
    values = [0.0, 0.5, INF, -INF, math.nan, torch.finfo(dtype).smallest_normal / 8, largest]
    rows = torch.tensor([*itertools.product(values, repeat=count)], dtype=dtype)
    return [column.contiguous() for column in rows.T]


def assert_equal_kinds(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare NaN, infinities and values up to rounding."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[found.dtype]
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor, states: dict[str, Tensor]) -> None:
    """Take one step, from these states if the algorithm has any."""
    weight.grad = torch.zeros_like(gradient)
    optimizer.step()
    found = optimizer.state[weight]
    for key, value in states.items():
        if key in found:
            found[key].copy_(value)
    if "max_exp_avg_sq" in found:
        found["max_exp_avg_sq"].copy_(states["exp_avg_sq"])
    weight.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_elements_that_are_not_centered_equal_those_of_torch(algorithm: str, dtype: torch.dtype) -> None:
    name, options = ALGORITHMS[algorithm]
    # torch rounds intermediate results to bfloat16, and adds g + μm for Nesterov: both overflow where ours do not.
    largest = 1e4 if dtype == torch.bfloat16 else torch.finfo(dtype).max / (4 if options.get("nesterov") else 1)
    weights, gradients, *values = combinations(dtype, 2 + len(STATES[name]), largest)
    states = dict(zip(STATES[name], values, strict=True))
    if "exp_avg_sq" in states:
        states["exp_avg_sq"].abs_()
    found = {}
    for module in (torch.optim, gradcentral):
        weight, other = nn.Parameter(weights.clone()), nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        ours = module is gradcentral
        gc: dict[str, Any] = {"layout": WeightLayout.from_shapes([weight, other])} if ours else {"foreach": False}
        optimizer = getattr(module, name)([weight, other], **options, **gc)
        step(optimizer, weight, gradients, states)
        kept = {key: value for key, value in optimizer.state[weight].items() if key != "step" and value is not None}
        found[ours] = {"weight": weight.detach(), **kept}
    for key, expected in found[False].items():
        assert_equal_kinds(found[True][key], expected, f"{algorithm}, {key}")


def masked_model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A classifier whose class 3 is masked by an infinite bias, and by an infinite weight in row 3."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).to(dtype)
    with torch.no_grad():
        model.bias[3] = -INF
        model.weight[3, 2] = -INF
    return model


def train(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(32, 5, generator=generator).to(model.weight.dtype)
    y = torch.randint(0, 3, (32,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        assert model.weight.grad is not None
        model.weight.grad[3] = 0  # torch's own gradient of this row is NaN: 0 · ∞ in the softmax
        optimizer.step()
    return torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)


@pytest.mark.parametrize("algorithm", ["sgd", "momentum", "adam", "amsgrad", "adamw", "adamw, no decay"])
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_masked_class_stays_masked_and_the_others_train(algorithm: str, placement: str, dtype: torch.dtype) -> None:
    """Every route gives the same weights; a row with an infinite weight has no mean, so "update" does not shift it."""
    name, options = ALGORITHMS[algorithm]
    model = masked_model(dtype)
    plain = train(model, getattr(torch.optim, name)(model.parameters(), **options))
    results = {}
    for route in ("attached", "fused", "unfused"):
        model = masked_model(dtype)
        if route == "attached":
            optimizer = getattr(torch.optim, name)(model.parameters(), **options)
            gradcentral.centralize(optimizer, model, placement)
        else:
            fused = {} if route == "fused" else {"fused": False}
            optimizer = getattr(gradcentral, name)(model, placement=placement, **options, **fused)
        results[route] = train(model, optimizer)
    assert results["fused"][3, 5] == -INF
    assert not results["fused"].isnan().any()
    assert results["fused"][:3].isfinite().all()
    for route, found in results.items():
        assert_equal_kinds(found, results["fused"], route)
        assert_equal_kinds(found[3], plain[3], route)
        assert not torch.equal(found[:3], plain[:3])


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_columns_with_an_infinite_weight_are_handled_like_rows(placement: str) -> None:
    results = {}
    for pattern in ("o [i]", "[i] o"):
        torch.manual_seed(0)
        start, gradient = torch.randn(6, 4), torch.randn(6, 4)
        start[2, 1] = INF
        swapped = pattern == "[i] o"
        layer = nn.Linear(4, 6, bias=False)
        layer.weight = nn.Parameter((start.T if swapped else start).contiguous())
        layout = weight_layout(layer, overrides={"weight": pattern})
        optimizer = gradcentral.AdamW(layer.parameters(), lr=0.1, layout=layout, placement=placement)
        layer.weight.grad = (gradient.T if swapped else gradient).contiguous()
        optimizer.step()
        weight = layer.weight.detach()
        results[pattern] = weight.T if swapped else weight
    torch.testing.assert_close(results["[i] o"], results["o [i]"])
    assert results["o [i]"][2, 1] == INF
    assert results["o [i]"].isnan().sum() == 0


def test_restoring_means_leaves_a_row_that_is_not_finite_alone() -> None:
    """In the row whose weight became NaN, only that weight is NaN."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gradcentral.centralize(optimizer, model, "update")
    model.weight.grad = torch.tensor([[math.nan, 1.0, 1.0], [0.0, 0.0, 3.0]])
    optimizer.step()
    expected = torch.tensor([[math.nan, 1.0, 2.0], [5.0, 6.0, 4.0]])
    torch.testing.assert_close(model.weight.detach(), expected, equal_nan=True)


def test_the_reference_algorithms_keep_an_infinite_weight() -> None:
    w, g = torch.tensor([[-INF, 1.0]]), torch.tensor([[0.0, 1.0]])
    new, m = sgd_step(w, g, None, None, "gradient", lr=0.1, momentum=0.9)
    assert new[0, 0] == -INF
    assert m is not None
    assert m.isfinite().all()
    new, state = adam_step(w, g, AdamState.zero(w), None, "gradient", lr=0.1)
    assert new[0, 0] == -INF
    assert state.m.isfinite().all()
