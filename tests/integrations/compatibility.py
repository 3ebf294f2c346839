"""Measures what `centralize` does with one optimizer, by training a small network.

An optimizer is trained without GC, with GC in each placement, and with gradients that the loop centers itself. The
outcome is judged by the weights: those of placements "gradient" and "regularized" must equal those of the loop, and the
means of the weight vectors must not move under "update". An absent error proves nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradcentral
from gradcentral.projection import center_regularized, unit_means

__all__ = ["Case", "Make", "Outcome", "effect_on_signs", "measure", "network"]

STEPS = (4, 40)  # the second where the weights do not move in the first steps
USAGES = ("plain", "closure", "loss", "create_graph")  # "loss": the closure returns a loss and computes no gradients
RATES: tuple[float | None, ...] = (None, 1e-2, 1e-1, 1.0, 1e-4)  # None: the optimizer's default
Make = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An optimizer to measure.

    Attributes:
        name: its name in its library.
        make: creates it: ``make(model, **options)``.
        decay: the L2 weight decay that the optimizer adds to the gradient if it is created with ``weight_decay=decay``;
            0 if its weight decay is decoupled or it has none.
    """

    name: str
    make: Make
    decay: float = 0.0


@dataclass
class Outcome:
    """What was measured.

    Attributes:
        problem: why the optimizer could not be trained even without GC; empty if it could.
        placements: for each placement ``"works"``, or why it does not.
        signs: whether every entry of an update has the same magnitude.
    """

    name: str
    problem: str = ""
    placements: dict[str, str] = field(default_factory=dict)
    signs: bool = False


def network() -> nn.Sequential:
    """Return a network with a convolution and two linear layers, one of them large enough for 8-bit states."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))


@dataclass
class _Training:
    """One training: the weights before and after, in the order of the layout."""

    before: list[Tensor]
    after: list[Tensor]
    last_update: Tensor
    layout: gradcentral.WeightLayout

    @property
    def moved(self) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(self.after, self.before, strict=True))

    @property
    def drift(self) -> float:
        """Return the largest change of the mean of a weight vector."""
        vectors = self.layout.values()
        pairs = zip(self.before, self.after, vectors, strict=True)
        return max(float(unit_means((b - a).double(), v).abs().max()) for a, b, v in pairs)

    @property
    def relative_drift(self) -> float:
        """Return the mean of |mean(w − w⁰)| over the weight vectors, divided by that of mean|w − w⁰|."""
        changes = [*zip(self.before, self.after, self.layout.values(), strict=True)]
        means = torch.cat([unit_means(b - a, vectors).abs().flatten() for a, b, vectors in changes])
        sizes = torch.cat([unit_means((b - a).abs(), vectors).flatten() for a, b, vectors in changes])
        return float(means.mean() / sizes.mean())

    def distance(self, other: _Training) -> float:
        pairs = [*zip(self.after, other.after, strict=True)]
        return sum(float((a - b).abs().sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


class _Run(NamedTuple):
    """How an optimizer is trained: the usage of its step, the learning rate, the number of steps."""

    usage: str
    rate: float | None
    steps: int


def _train(case: Case, run: _Run, gc: str = "", by_hand: str = "", decay: float = 0.0) -> _Training:
    """Train with GC attached in placement ``gc``, or centering ``by_hand``, or without."""
    model = network()
    layout = gradcentral.weight_layout(model)
    options = ({} if run.rate is None else {"lr": run.rate}) | ({"weight_decay": decay} if decay else {})
    optimizer = case.make(model, **options)
    images, labels = torch.rand(run.steps, 8, 1, 8, 8), torch.randint(0, 10, (run.steps, 8))
    decay_by_hand = case.decay if by_hand == "regularized" and decay else 0.0
    center: Callable[[], None] = partial(_center_by_hand, layout, decay_by_hand)
    weight = model.get_parameter("3.weight")
    base = getattr(optimizer, "base_optimizer", None)  # SAM: its first step uses the gradients as they are
    if by_hand and base is not None:
        base.register_step_pre_hook(lambda *_: center())
    if gc:
        gradcentral.centralize(optimizer, model, gc)
    with suppress(AttributeError):  # Schedule-Free optimizers have modes
        optimizer.train()
    before = [p.detach().clone() for p in layout]
    torch.manual_seed(1)
    for step in range(run.steps):
        start = weight.detach().clone()

        def closure(step: int = step) -> Tensor:
            model.zero_grad()
            loss = cross_entropy(model(images[step]), labels[step])
            loss.backward(create_graph=run.usage == "create_graph")
            if by_hand and base is None:
                center()
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            if run.usage == "closure":
                optimizer.step(closure)
            elif run.usage == "loss":
                loss = float(closure())
                optimizer.step(lambda loss=loss: loss)
            else:
                closure()
                optimizer.step()
    with suppress(AttributeError):
        optimizer.eval()
    after = [p.detach().clone() for p in layout]
    return _Training(before, after, weight.detach() - start, layout)


@torch.no_grad()
def _center_by_hand(layout: gradcentral.WeightLayout, decay: float) -> None:
    for p, vectors in layout.items():
        if p.grad is not None:
            p.grad.copy_(center_regularized(p.grad, p, decay, vectors))


def measure(case: Case) -> Outcome:
    """Train with the optimizer in every placement and judge the weights."""
    outcome = Outcome(case.name)
    found = _works_without_gc(case, outcome)
    if found is None:
        return outcome
    run, plain = found
    sizes = plain.last_update[plain.last_update != 0].abs()
    outcome.signs = bool(len(sizes) and sizes.max() <= 1.01 * sizes.min())
    outcome.placements["gradient"] = _judge_gradient(case, run, "gradient", 0.0)
    outcome.placements["regularized"] = _judge_gradient(case, run, "regularized", case.decay)
    if outcome.placements["regularized"].startswith("ValueError: placement 'regularized' needs L2"):
        without = replace(case, make=partial(case.make, weight_decay=0))
        outcome.placements["regularized"] = f"without decay: {_judge_gradient(without, run, 'regularized', 0.0)}"
    outcome.placements["update"] = _judge_update(case, run, plain)
    return outcome


def _works_without_gc(case: Case, outcome: Outcome) -> tuple[_Run, _Training] | None:
    """Find a way to train without GC in which the weights move and their means drift; None if there is none."""
    problems: dict[str, str] = {}
    reason = "the weights hardly move in 40 steps"
    for usage in USAGES:
        for run in (_Run(usage, rate, steps) for steps in STEPS for rate in RATES):
            try:
                plain = _train(case, run)
            except Exception as error:  # any error of any library
                problems.setdefault(usage, f"{type(error).__name__}: {error}")
                if run.rate is not None:
                    break
                continue
            if 1e-3 < plain.moved < 1:
                return run, plain
            if not plain.moved < 1:
                reason = "it diverges in the small network of the test"
                if run.steps == STEPS[1]:
                    break
    outcome.problem = problems.get("plain", reason).partition("\n")[0]
    return None


def _judge_gradient(case: Case, run: _Run, placement: str, decay: float) -> str:
    try:
        attached = _train(case, run, gc=placement, decay=decay)
    except Exception as error:  # any error of any library
        return f"{type(error).__name__}: {error}"
    by_hand = _train(case, run, by_hand=placement, decay=decay)
    plain = _train(case, run, decay=decay)
    effect = plain.distance(by_hand)
    if effect < 1e-5 * plain.moved:
        return "no effect"
    off = attached.distance(by_hand) / effect
    return "works" if off < 0.01 else f"not centered: differs from centering by hand by {off:.0%} of the effect"


def _judge_update(case: Case, run: _Run, plain: _Training) -> str:
    try:
        attached = _train(case, run, gc="update")
    except Exception as error:  # any error of any library
        return f"{type(error).__name__}: {error}"
    if plain.drift < 1e-5 * plain.moved:
        return "no effect"
    still = attached.drift < 1e-6 * (1 + attached.moved) and attached.drift < plain.drift / 10
    if not 1e-4 < attached.moved < math.inf:
        return f"the weights moved by {attached.moved:.0e}"
    return "works" if still else f"drift {attached.drift:.0e}; without GC {plain.drift:.0e}"


def effect_on_signs(case: Case) -> tuple[float, float, float, float]:
    """Return what GC does to an optimizer whose updates have entries of one magnitude.

    Returns:
        The fraction of the entries of the first update whose sign placement "gradient" changes; and after 40 steps,
        without GC, with "gradient" and with "update", `_Training.relative_drift`.
    """
    one, long = _Run("plain", 1e-3, 1), _Run("plain", 1e-3, STEPS[1])
    first, centered = _train(case, one).last_update, _train(case, one, gc="gradient").last_update
    changed = float((first.sign() != centered.sign()).double().mean())
    without, gradient, update = (_train(case, long, gc=gc).relative_drift for gc in ("", "gradient", "update"))
    return changed, without, gradient, update
