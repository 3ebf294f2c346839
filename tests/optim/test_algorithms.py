"""`centralize` on torch's optimizers: the paper's algorithms, both placements, and the constraint eᵀ(w − w⁰) = 0.

The algorithms are derived from the paper in test_reference.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral import WeightLayout, WeightVectors, center, centralize, weight_layout
from gradcentral.optim.reference import AdamState, adam_step, sgd_step
from gradcentral.projection import unit_means
from tests.strategies import Case, cases

ROWS = WeightVectors((1,))


def _weight(columns: int = 5) -> nn.Parameter:
    return nn.Parameter(torch.randn(4, columns, dtype=torch.float64))


def _gradients(steps: int, weight: Tensor) -> list[Tensor]:
    return [torch.randn_like(weight) + 0.5 for _ in range(steps)]


def _run(
    make: Callable[[list[Tensor]], Optimizer], w: nn.Parameter, gradients: Iterable[Tensor], placement: str
) -> Tensor:
    """Return the weights after one step per gradient, with GC attached to the optimizer."""
    w = nn.Parameter(w.detach().clone())
    optimizer = make([w])
    centralize(optimizer, placement=placement, layout=WeightLayout.from_shapes([w]))
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


def _same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_sgd_with_momentum_is_algorithm_1() -> None:
    """The paper's factor 1 − β of the gradient is torch's dampening."""
    alpha, beta = 0.1, 0.9
    w0 = _weight()
    gradients = _gradients(4, w0)
    w, m = w0.detach().clone(), None
    for g in gradients:
        w, m = sgd_step(w, g, m, ROWS, "gradient", lr=alpha, momentum=beta, dampening=beta)
    _same(
        _run(lambda p: torch.optim.SGD(p, lr=alpha, momentum=beta, dampening=beta), w0, gradients, "gradient"),
        w,
    )


def test_adam_is_algorithm_2() -> None:
    w0 = _weight()
    gradients = _gradients(4, w0)
    w, state = w0.detach().clone(), AdamState.zero(w0)
    for g in gradients:
        w, state = adam_step(w, g, state, ROWS, "gradient", lr=0.01, betas=(0.9, 0.99))
    _same(_run(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)), w0, gradients, "gradient"), w)


def test_update_on_sgd_with_l2_is_centering_the_gradient_with_its_decay() -> None:
    """As in the authors' code, ĝ ← Φ(g + λw): the reference with the decay added to its gradient."""
    alpha, beta, decay = 0.1, 0.9, 0.05
    w0 = _weight()
    gradients = _gradients(4, w0)
    w, m = w0.detach().clone(), None
    for g in gradients:
        w, m = sgd_step(w, g + decay * w, m, ROWS, "gradient", lr=alpha, momentum=beta)
    found = _run(lambda p: torch.optim.SGD(p, lr=alpha, momentum=beta, weight_decay=decay), w0, gradients, "update")
    _same(found, w)


@pytest.mark.parametrize("decoupled", [False, True])
def test_update_on_adam_is_centering_after_the_adaptive_term(decoupled: bool) -> None:
    """The step is w ← w + Φ(Δw) with Adam's own Δw, weight decay included."""
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    w0 = _weight()
    gradients = _gradients(4, w0)
    w, state = w0.detach().clone(), AdamState.zero(w0)
    for g in gradients:
        plain, state = adam_step(w, g, state, None, "update", lr=0.01, weight_decay=0.1, decoupled=decoupled)
        w = w + center(plain - w, ROWS)
    _same(_run(lambda p: kind(p, lr=0.01, weight_decay=0.1), w0, gradients, "update"), w)


def test_gradient_placement_lets_weight_decay_act_as_the_optimizer_defines_it() -> None:
    w0 = _weight()
    found = _run(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), w0, [torch.zeros_like(w0)], "gradient")
    _same(found, w0.detach() * 0.95)


# Every optimizer of torch, with weight decay where it has one: eᵀ(w − w⁰) = 0 after T steps of "update".

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.1, "weight_decay": 0.1},
    "NAdam": {"lr": 0.05, "weight_decay": 0.1},
    "RAdam": {"lr": 0.05, "weight_decay": 0.1},
    "Adamax": {"lr": 0.05, "weight_decay": 0.1},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.1},
    "LBFGS": {"lr": 0.2, "max_iter": 4, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.05, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_update_keeps_the_mean_of_every_weight_vector(name: str, dtype: torch.dtype) -> None:
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip(f"this torch has no {name}: run with a newer one")
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).to(dtype)
    # The means are not zero, so weight decay would change them.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2)
    start = copy.deepcopy(model)
    x, y = torch.rand(16, 6, dtype=dtype), torch.rand(16, 3, dtype=dtype)
    drifts = {}
    for placement in ("update", None):
        net = copy.deepcopy(start)
        optimizer = kind(net.parameters(), **OPTIMIZERS[name])
        if placement:
            centralize(optimizer, net, placement)

        def closure(net: nn.Module = net, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (net(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(20):
            optimizer.step(closure)
        pairs = zip(net.parameters(), start.parameters(), strict=True)
        drifts[placement] = max(
            float((math.sqrt(p.shape[1]) * unit_means((p - w0).detach().double(), ROWS)).abs().max()) for p, w0 in pairs
        )
    assert drifts["update"] < 20 * torch.finfo(dtype).eps * 3
    assert drifts[None] > 1e-3  # without GC the same training changes the means


@given(
    case=cases((torch.float64,), expanded=False),
    decay=st.sampled_from([0.0, 0.1]),
    placement=st.sampled_from(["gradient", "update"]),
)
def test_placements_over_random_views_and_strides(case: Case, decay: float, placement: str) -> None:
    """One step of SGD on any shape, view and strides equals the reference."""
    tensor, vectors = case
    if vectors.for_shape(tensor.shape).fan_in == 1:
        return
    g = torch.randn_like(tensor)
    expected, _ = sgd_step(tensor.clone(), g, None, vectors, placement, lr=0.5, weight_decay=decay)
    model = nn.ParameterDict({"w": nn.Parameter(tensor)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=decay)
    centralize(optimizer, placement=placement, layout=weight_layout(model, overrides={"w": vectors}))
    model["w"].grad = g
    optimizer.step()
    torch.testing.assert_close(model["w"].detach(), expected, rtol=0, atol=1e-12)
