"""The steps of other implementations, from their formulas, equal those of the options that docs/migration.md names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightLayout, centralize, weight_layout

LR, BETA1, BETA2, EPS = 0.02, 0.9, 0.99, 1e-8

Phi = Callable[[Tensor], Tensor]
State = dict[str, Any]
Options = dict[str, Any]
Formula = Callable[[Tensor, Tensor, State, Phi, float, Options], Tensor]
"""(w, g, state, Φ, λ, options) → Δw; the state starts with t = 1 in the first step and is changed in place."""


class Net(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 18)
        self.convolution = nn.Conv2d(2, 4, 2)
        self.linear = nn.Linear(16, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        images = self.embedding(tokens).view(-1, 2, 3, 3)
        output: Tensor = self.linear(self.convolution(images).tanh().flatten(1))
        return output


def _backward(model: Net, step: int) -> None:
    model.zero_grad()
    tokens = torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))
    torch.autograd.backward((model(tokens) - 1).square().mean())


def _phi(shape: torch.Size, only: str) -> Phi:
    """Return what the other implementations do to a tensor: the mean over axes 1 and up, or nothing."""
    if len(shape) <= (3 if only == "conv" else 1):
        return lambda tensor: tensor
    return lambda tensor: tensor - tensor.mean(tuple(range(1, len(shape))), keepdim=True)


def _momentum(d: Tensor, s: State, o: Options) -> Tensor:
    if not o.get("momentum"):
        return d
    m: Tensor = d if s["t"] == 1 else o["momentum"] * s["m"] + d
    s["m"] = m
    return d + o["momentum"] * m if o.get("nesterov") else m


def _moments(d: Tensor, s: State) -> tuple[Tensor, Tensor, float, float]:
    """Return m, v and the bias corrections 1 − β₁ᵗ and 1 − β₂ᵗ."""
    s["m"] = BETA1 * s.get("m", 0.0) + (1 - BETA1) * d
    s["v"] = BETA2 * s.get("v", 0.0) + (1 - BETA2) * d.square()
    return s["m"], s["v"], 1 - BETA1 ** s["t"], 1 - BETA2 ** s["t"]


def sgd_gc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    return -LR * _momentum(phi(g + decay * w), s, o)


def sgd_gc_last(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    return -LR * phi(_momentum(g + decay * w, s, o))


def sgdw_gc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    return -LR * (_momentum(phi(g), s, o) + decay * w)


def sgd_decay_last(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    return -LR * _momentum(phi(g) + decay * w, s, o)


def adam_gc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(phi(g + decay * w), s)
    return -LR * (m / b1) / ((v / b2).sqrt() + EPS)


def adam_gc2(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(g + decay * w, s)
    return -LR * phi((m / b1) / ((v / b2).sqrt() + EPS))


def adagrad_gc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    d = phi(g + decay * w)
    v: Tensor = s.get("v", 0.0) + d.square()
    s["v"] = v
    return -LR * d / (v.sqrt() + 1e-10)


def adamw_gc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(phi(g), s)
    return -LR * math.sqrt(b2) / b1 * (m / (v.sqrt() + EPS) + decay * w)


def adamw_gc2(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(g, s)
    return -LR * math.sqrt(b2) / b1 * phi(m / (v.sqrt() + EPS) + decay * w)


def adamw_gc_loc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(phi(g), s)
    return -LR / b1 * (m / ((v / b2).sqrt() + EPS) + decay * w)


def adamw_gc_not_loc(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(g, s)
    return -LR / b1 * phi(m / ((v / b2).sqrt() + EPS) + decay * w)


def adamw_centralize_first(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(phi(g), s)
    return -LR * ((m / b1) / ((v / b2).sqrt() + EPS) + decay * w)


def adamw_centralize_last(w: Tensor, g: Tensor, s: State, phi: Phi, decay: float, o: Options) -> Tensor:
    m, v, b1, b2 = _moments(g, s)
    return -LR * phi((m / b1) / ((v / b2).sqrt() + EPS) + decay * w)


def _decay_before(optimizer: torch.optim.Optimizer, t: int, decay: float) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
            for p in group["params"]:
                p.mul_(1 - LR * decay)


def _scaled_eps_and_decay(optimizer: torch.optim.Optimizer, t: int, decay: float) -> None:
    b1, b2 = 1 - BETA1**t, 1 - BETA2**t
    for group in optimizer.param_groups:
        group.update(eps=EPS / math.sqrt(b2), weight_decay=decay * b2**0.5 / b1)


def _scaled_decay(optimizer: torch.optim.Optimizer, t: int, decay: float) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = decay / (1 - BETA1**t)


class Row(NamedTuple):
    """A row of the table: a formula and the options that reproduce it."""

    formula: Formula
    optimizer: str
    placement: str
    decay: float
    options: Options = {}  # noqa: RUF012
    before_step: Callable[[torch.optim.Optimizer, int, float], None] | None = None

    def __str__(self) -> str:
        options = "-".join(self.options)
        return f"{self.formula.__name__}-{self.placement}-{self.decay}{'-' + options if options else ''}"


MOMENTA: list[Options] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
BETAS = {"betas": (BETA1, BETA2), "eps": EPS}
ROWS = [
    *(Row(formula, "SGD", "update", d, o) for formula in (sgd_gc, sgd_gc_last) for d in (0.0, 0.1) for o in MOMENTA),
    *(Row(sgd_gc, "SGD", "regularized", d, o) for d in (0.0, 0.1) for o in MOMENTA),
    *(Row(sgd_gc, "SGD", "gradient", 0.0, o) for o in MOMENTA),
    *(Row(sgd_decay_last, "SGD", "gradient", d, o) for d in (0.0, 0.1) for o in MOMENTA),
    *(Row(sgdw_gc, "SGD", "gradient", 0.0, o) for o in MOMENTA),
    Row(sgdw_gc, "SGD", "gradient", 0.1),
    *(Row(sgdw_gc, "SGD", "gradient", 0.1, o, _decay_before) for o in MOMENTA),
    *(Row(adam_gc, "Adam", "regularized", d, BETAS) for d in (0.0, 0.1)),
    Row(adam_gc, "Adam", "gradient", 0.0, BETAS),
    *(Row(adam_gc2, "Adam", "update", d, BETAS) for d in (0.0, 0.1)),
    *(Row(adagrad_gc, "Adagrad", "regularized", d) for d in (0.0, 0.1)),
    Row(adagrad_gc, "Adagrad", "gradient", 0.0),
    *(Row(adamw_gc, "AdamW", "gradient", d, BETAS, _scaled_eps_and_decay) for d in (0.0, 0.1)),
    *(Row(adamw_gc2, "AdamW", "update", d, BETAS, _scaled_eps_and_decay) for d in (0.0, 0.1)),
    *(Row(adamw_gc_loc, "AdamW", "gradient", d, BETAS, _scaled_decay) for d in (0.0, 0.1)),
    *(Row(adamw_gc_not_loc, "AdamW", "update", d, BETAS, _scaled_decay) for d in (0.0, 0.1)),
    *(Row(adamw_centralize_first, "AdamW", "gradient", d, BETAS) for d in (0.0, 0.1)),
    *(Row(adamw_centralize_last, "AdamW", "update", d, BETAS) for d in (0.0, 0.1)),
]


def _optimizer(row: Row, model: Net, only: str, own: bool) -> torch.optim.Optimizer:
    layout = weight_layout(model, only="conv") if only == "conv" else WeightLayout.from_shapes(model.named_parameters())
    options: Options = {"lr": LR, "weight_decay": row.decay, **row.options}
    if own:
        optimizer: torch.optim.Optimizer = getattr(gradcentral, row.optimizer)(
            model.parameters(), **options, layout=layout, placement=row.placement
        )
        return optimizer
    optimizer = getattr(torch.optim, row.optimizer)(model.parameters(), **options)
    centralize(optimizer, layout=layout, placement=row.placement)
    return optimizer


def _train_by_formula(row: Row, phi_of: Callable[[torch.Size], Phi]) -> Net:
    """Train for twenty steps as the other implementation does."""
    theirs = Net()
    states: list[State] = [{} for _ in theirs.parameters()]
    for t in range(1, 21):
        _backward(theirs, t)
        with torch.no_grad():
            for p, state in zip(theirs.parameters(), states, strict=True):
                assert p.grad is not None
                state["t"] = t
                p.add_(row.formula(p.clone(), p.grad, state, phi_of(p.shape), row.decay, row.options))
    return theirs


def _train(optimizer: torch.optim.Optimizer, model: Net, row: Row) -> None:
    for t in range(1, 21):
        _backward(model, t)
        if row.before_step is not None:
            row.before_step(optimizer, t, row.decay)
        optimizer.step()


def _assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for p, wanted, old in zip(model.parameters(), expected.parameters(), Net().parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-12)
        assert float((p - old).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("only", ["all", "conv"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_twenty_steps_equal_the_formula(row: Row, only: str) -> None:
    theirs = _train_by_formula(row, lambda shape: _phi(shape, only))
    for own in [True, False] if hasattr(gradcentral, row.optimizer) else [False]:
        model = Net()
        _train(_optimizer(row, model, only, own), model, row)
        _assert_equal(model, theirs)


WITHOUT_GC = [
    *(Row(sgd_gc, "SGD", "none", d, o) for d in (0.0, 0.1) for o in MOMENTA),
    *(Row(adam_gc, "Adam", "none", d, BETAS) for d in (0.0, 0.1)),
    *(Row(adagrad_gc, "Adagrad", "none", d) for d in (0.0, 0.1)),
    *(Row(adamw_gc_loc, "AdamW", "none", d, BETAS, _scaled_decay) for d in (0.0, 0.1)),
]


@pytest.mark.parametrize("row", WITHOUT_GC, ids=str)
def test_twenty_steps_without_gc_equal_those_of_torch(row: Row) -> None:
    theirs, model = _train_by_formula(row, lambda shape: lambda tensor: tensor), Net()
    optimizer = getattr(torch.optim, row.optimizer)(model.parameters(), lr=LR, weight_decay=row.decay, **row.options)
    _train(optimizer, model, row)
    _assert_equal(model, theirs)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["Adai", "AdamP", "Lion", "Ranger"])
def test_twenty_steps_of_pytorch_optimizer_equal_those_with_centralize(name: str, decay: float) -> None:
    theirs = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer: run `make trainers`")

    def train(use_gc: bool, attach: bool) -> Net:
        model = Net()
        optimizer = getattr(theirs, name)(model.parameters(), lr=LR, weight_decay=decay, use_gc=use_gc)
        if attach:
            centralize(optimizer, layout=WeightLayout.from_shapes(model.named_parameters()))
        for t in range(1, 21):
            _backward(model, t)
            optimizer.step()
        return model

    expected = train(use_gc=True, attach=False)
    _assert_equal(train(use_gc=False, attach=True), expected)
    with pytest.raises(AssertionError):
        _assert_equal(train(use_gc=False, attach=False), expected)
