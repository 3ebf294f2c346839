"""The reference algorithms equal the paper's formulas and torch; every other implementation equals the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral import WeightLayout, WeightVectors, center, weight_layout
from gradcentral.kernels import native
from gradcentral.optim.reference import AdamState, adam_step, sgd_step
from gradcentral.projection import restore_means_, unit_means
from gradcentral.targets import PLACEMENTS

STEPS = 100

WEIGHTS: dict[str, tuple[tuple[int, ...], WeightVectors | None]] = {
    "rows": ((5, 7), WeightVectors((1,))),
    "columns": ((6, 4), WeightVectors((0,))),
    "grouped": ((8, 3, 2, 2), WeightVectors((1, 3, 4), view=(2, 4, 3, 2, 2))),  # a transposed convolution, 2 groups
    # Transposed convolutions with kernel 4 and stride 2, one weight vector per phase.
    "phases": ((3, 2, 4, 4), WeightVectors((0, 2, 4), view=(3, 2, 2, 2, 2, 2))),
    "channels_last_phases": ((3, 2, 4, 4), WeightVectors((0, 2, 4), view=(3, 2, 2, 2, 2, 2))),
    "not_centered": ((5,), None),
    "channels_last": ((4, 3, 2, 2), WeightVectors((1, 2, 3))),
    "channels_last_transposed": ((3, 4, 2, 2), WeightVectors((0, 2, 3))),
}

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, L2": ("SGD", {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "momentum, L2": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "dampened momentum, L2": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Nesterov, L2": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, L2": ("Adam", {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "AMSGrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "AMSGrad, L2": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.05}),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW without decay": ("AdamW", {"lr": 0.01, "weight_decay": 0.0}),
    "AdamW, AMSGrad": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
}

by_placement = pytest.mark.parametrize("placement", PLACEMENTS)
by_rule = pytest.mark.parametrize("rule", RULES)


def _numbers(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random tensors with the shapes of `WEIGHTS` and a nonzero mean, which centering removes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {name: torch.randn(shape, generator=generator) + 0.5 for name, (shape, _) in WEIGHTS.items()}
    for name in numbers:
        if name.startswith("channels_last"):
            numbers[name] = numbers[name].contiguous(memory_format=torch.channels_last)
    return {name: tensor.to(dtype) for name, tensor in numbers.items()}


def _reference_step(
    rule: str, w: Tensor, g: Tensor, state: Any, vectors: WeightVectors | None, placement: str
) -> tuple[Tensor, Any]:
    kind, options = RULES[rule]
    if kind == "SGD":
        return sgd_step(w, g, state, vectors, placement, **options)
    state = AdamState.zero(w) if state is None else state
    return adam_step(w, g, state, vectors, placement, **options, decoupled=kind == "AdamW")


@functools.cache
def _reference_weights(rule: str, placement: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights after `STEPS` steps in float64, from weights and gradients that are exact in ``dtype``."""
    weights = {name: w.double() for name, w in _numbers(0, dtype).items()}
    states: dict[str, Any] = dict.fromkeys(weights)
    for step in range(1, STEPS + 1):
        for name, g in _numbers(step, dtype).items():
            weights[name], states[name] = _reference_step(
                rule, weights[name], g.double(), states[name], WEIGHTS[name][1], placement
            )
    return weights


class Trained(NamedTuple):
    """Parameters and the optimizer that updates them."""

    params: dict[str, nn.Parameter]
    optimizer: Optimizer


Implementation = Callable[[str, str, torch.dtype], Trained]


def _params_and_layout(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], WeightLayout]:
    model = nn.ParameterDict({name: nn.Parameter(w) for name, w in _numbers(0, dtype).items()})
    overrides: dict[Any, Any] = {name: vectors for name, (_, vectors) in WEIGHTS.items() if vectors is not None}
    return dict(model.items()), weight_layout(model, overrides=overrides)


def _fused(rule: str, placement: str, dtype: torch.dtype, **own: Any) -> Trained:
    kind, options = RULES[rule]
    params, layout = _params_and_layout(dtype)
    make = getattr(gradcentral, kind)
    return Trained(params, make([*params.values()], **options, **own, layout=layout, placement=placement))


def _by_torchs_step(rule: str, placement: str, dtype: torch.dtype) -> Trained:
    return _fused(rule, placement, dtype, fused=False)


def _attached(rule: str, placement: str, dtype: torch.dtype) -> Trained:
    kind, options = RULES[rule]
    params, layout = _params_and_layout(dtype)
    optimizer: Optimizer = getattr(torch.optim, kind)([*params.values()], **options)
    gradcentral.centralize(optimizer, layout=layout, placement=placement)
    return Trained(params, optimizer)


def _step(trained: Trained, seed: int, dtype: torch.dtype) -> None:
    for name, g in _numbers(seed, dtype).items():
        trained.params[name].grad = g
    trained.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [_fused, _by_torchs_step, _attached])
@by_placement
@by_rule
def test_100_steps_equal_the_reference(rule: str, placement: str, make: Implementation, dtype: torch.dtype) -> None:
    trained = make(rule, placement, dtype)
    for step in range(1, STEPS + 1):
        _step(trained, step, dtype)
    for name, expected in _reference_weights(rule, placement, dtype).items():
        # Each step rounds a weight once or twice, by at most eps/2 of its size.
        atol = STEPS * torch.finfo(dtype).eps * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(trained.params[name].detach().double(), expected, rtol=0, atol=atol)


@pytest.mark.skipif(bool(native.unavailable_reason()), reason="torch's own steps round bfloat16 after every operation")
@by_placement
@by_rule
def test_each_of_100_steps_in_bfloat16_equals_the_reference_rounded_once(rule: str, placement: str) -> None:
    """Compare step by step: the weights and states of a long bfloat16 run differ by all of its rounding errors."""
    trained = _fused(rule, placement, torch.bfloat16)
    roundoff = torch.finfo(torch.bfloat16).eps / 2
    for step in range(1, STEPS + 1):
        before = {name: p.detach().double() for name, p in trained.params.items()}
        states = {name: _reference_state(trained.optimizer.state.get(p)) for name, p in trained.params.items()}
        _step(trained, step, torch.bfloat16)
        for name, g in _numbers(step, torch.bfloat16).items():
            vectors = WEIGHTS[name][1]
            expected, _ = _reference_step(rule, before[name], g.double(), states[name], vectors, placement)
            # One rounding of the weight; under "update", the change is also computed from rounded moments.
            largest_change = float((expected - before[name]).abs().max())
            torch.testing.assert_close(
                trained.params[name].detach().double(), expected, rtol=roundoff, atol=4 * roundoff * largest_change
            )


def _reference_state(state: dict[str, Any] | None) -> Any:
    """Return torch's optimizer state of one parameter in the form that the reference takes."""
    if not state:
        return None
    if "exp_avg" not in state:
        return state["momentum_buffer"].double()
    m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
    return AdamState(m, v, state.get("max_exp_avg_sq", v).double(), int(state["step"]))


# The reference itself.


@by_placement
@by_rule
def test_the_reference_without_weight_vectors_is_torchs_optimizer(rule: str, placement: str) -> None:
    kind, options = RULES[rule]
    p = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    optimizer = getattr(torch.optim, kind)([p], **options)
    w, state = p.detach().clone(), None
    for _ in range(20):
        p.grad = torch.randn_like(p)
        optimizer.step()
        w, state = _reference_step(rule, w, p.grad, state, None, placement)
    torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-14)


def test_sgd_from_an_empty_momentum_buffer_is_the_papers_algorithm_1() -> None:
    """The algorithm is m ← β m + (1 − β) Φ(g), w ← w − α m, from m = 0 (torch starts from the first gradient)."""
    rows, alpha, beta = WeightVectors((1,)), 0.1, 0.9
    w = found = torch.randn(4, 5, dtype=torch.float64)
    m: Tensor = torch.zeros_like(w)
    buffer: Tensor | None = torch.zeros_like(w)
    for _ in range(10):
        g = torch.randn_like(w) + 0.5
        m = beta * m + (1 - beta) * center(g, rows)
        w = w - alpha * m
        found, buffer = sgd_step(found, g, buffer, rows, "gradient", lr=alpha, momentum=beta, dampening=beta)
    torch.testing.assert_close(found, w, rtol=0, atol=1e-14)


def test_adam_is_the_papers_algorithm_2() -> None:
    """The algorithm is m ← β₁m + (1 − β₁)ĝ, v ← β₂v + (1 − β₂)ĝ², w ← w − α m̂ / (√v̂ + ε), with ĝ = Φ(g)."""
    rows, alpha, beta1, beta2, eps = WeightVectors((1,)), 0.01, 0.9, 0.99, 1e-8
    w = found = torch.randn(4, 5, dtype=torch.float64)
    m = v = torch.zeros_like(w)
    state = AdamState.zero(w)
    for t in range(1, 11):
        g = torch.randn_like(w) + 0.5
        g_hat = center(g, rows)
        m = beta1 * m + (1 - beta1) * g_hat
        v = beta2 * v + (1 - beta2) * g_hat**2
        w = w - alpha * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)
        found, state = adam_step(found, g, state, rows, "gradient", lr=alpha, betas=(beta1, beta2), eps=eps)
    torch.testing.assert_close(found, w, rtol=0, atol=1e-14)


@by_rule
def test_placement_update_restores_the_means_after_a_plain_step(rule: str) -> None:
    """The identity is w + Φ(Δw) = restore_means_(w + Δw, unit_means(w))."""
    for name, (_, vectors) in WEIGHTS.items():
        if vectors is None:
            continue
        w = _numbers(0, torch.float64)[name]
        plain_state = state = None
        for step in range(1, 6):
            g = _numbers(step, torch.float64)[name]
            plain, plain_state = _reference_step(rule, w, g, plain_state, None, "update")
            updated, state = _reference_step(rule, w, g, state, vectors, "update")
            restored = restore_means_(plain, unit_means(w, vectors), vectors)
            torch.testing.assert_close(updated, restored, rtol=0, atol=1e-14)
            w = updated


@by_placement
@by_rule
def test_the_reference_leaves_its_arguments_unchanged(rule: str, placement: str) -> None:
    w, g = torch.randn(4, 5), torch.randn(4, 5)
    _, state = _reference_step(rule, w, g, None, WeightVectors((1,)), placement)
    tensors = [w, g, *(part for part in (state if isinstance(state, tuple) else [state]) if isinstance(part, Tensor))]
    copies = [tensor.clone() for tensor in tensors]
    _reference_step(rule, w, g, state, WeightVectors((1,)), placement)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
