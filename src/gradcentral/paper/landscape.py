"""Is the loss smoother where GC goes? Its variation along the steps, and its curvature, along training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import NONE
from gradcentral.layout import WeightLayout
from gradcentral.paper.figure import Figure
from gradcentral.paper.hessian import top_eigenvalue
from gradcentral.paper.study import Batch, Moment, Study, gradient_of
from gradcentral.plotting import STYLES, Theme, new_figure, style
from gradcentral.projection import center

__all__ = ["landscape"]

_ARMS = (NONE, "gradient")
# In lengths of the step that was taken, as Santurkar et al. 2018 look ahead along the gradient.
_REACH = (0.25, 0.5, 1.0, 2.0, 4.0)
_POINTS = 24
# Products with the Hessian take a few passes each, and a large batch is costly; the loss is that of training's batches.
_TOLERANCE, _ITERATIONS = 1e-2, 30


class _Look(NamedTuple):
    arm: str
    step: int
    loss_low: float
    loss_high: float
    gradient_change: float
    curvature: float


class _Before(NamedTuple):
    """What is kept of a step until it is known where it went."""

    step: int
    batch: Batch
    weights: list[Tensor]


def landscape(study: Study) -> Figure:
    """The lower two statements of theorem 4.2, along training: how the loss and its gradient vary along the steps."""
    looks: list[_Look] = []
    every = max(1, study.steps // _POINTS)
    for arm in _ARMS:
        before: _Before | None = None
        for moment in study.track(study.train(arm, study.seed), study.steps):
            if before is not None:
                looks.append(_look(study, arm, moment, before))
                before = None
            if moment.step % every == 0:
                before = _Before(moment.step, moment.batch, [w.detach().clone() for w in moment.model.parameters()])
    return Figure(
        f"{study.task.name}, {study.optimizer}: the loss around the way of training, with and without GC",
        lambda theme: _draw(looks, theme),
        _Look._fields,
        looks,
    )


def _look(study: Study, arm: str, moment: Moment, before: _Before) -> _Look:
    """Look ahead from where the step began, on its batch, along the way it went; then put everything back."""
    model, layout = moment.model, moment.layout if arm != NONE else None
    weights = list(model.parameters())
    now = [w.detach().clone() for w in weights]
    way = [after - start for after, start in zip(now, before.weights, strict=True)]
    with preserve_state(model):
        try:
            _set(weights, before.weights)
            curvature = abs(
                top_eigenvalue(
                    model,
                    study.task.loss,
                    before.batch,
                    layout=layout,
                    tolerance=_TOLERANCE,
                    max_iterations=_ITERATIONS,
                ).value
            )
            here, g = _loss_and_gradient(study, model, before.batch, layout)
            losses, changes = [here], [0.0]
            for reach in _REACH:
                _set(weights, [start + reach * step for start, step in zip(before.weights, way, strict=True)])
                there, other = _loss_and_gradient(study, model, before.batch, layout)
                losses.append(there)
                changes.append(float((other - g).norm()))
        finally:
            _set(weights, now)
    finite = [loss for loss in losses if math.isfinite(loss)]
    return _Look(arm, before.step, min(finite, default=here), max(finite, default=here), max(changes), curvature)


def _loss_and_gradient(
    study: Study, model: nn.Module, batch: Batch, layout: WeightLayout | None
) -> tuple[float, Tensor]:
    """The loss and the gradient that training follows: centered with GC."""
    torch.manual_seed(0)  # the same dropout everywhere along the way
    model.zero_grad(set_to_none=True)
    loss = study.task.loss(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    parts = []
    for w in model.parameters():
        if w.requires_grad:
            g = gradient_of(w)
            parts.append((center(g, layout[w]) if layout is not None and w in layout else g).flatten())
    return float(loss.detach()), torch.cat(parts)


def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for w, value in zip(weights, values, strict=True):
            w.copy_(value)


def _draw(looks: list[_Look], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 3.7)
        axes = figure.subplots(1, 3)
        for arm in _ARMS:
            mine = [look for look in looks if look.arm == arm]
            at, color, name = [look.step for look in mine], theme.arms[arm], "without GC" if arm == NONE else "with GC"
            axes[0].fill_between(
                at, [k.loss_low for k in mine], [k.loss_high for k in mine], color=color, alpha=0.3, lw=0, label=name
            )
            for bound in ("loss_low", "loss_high"):
                axes[0].plot(at, [getattr(k, bound) for k in mine], STYLES[arm], color=color, lw=0.9)
            axes[1].plot(at, [k.gradient_change for k in mine], STYLES[arm], color=color, lw=1.7, label=name)
            axes[2].plot(at, [k.curvature for k in mine], STYLES[arm], color=color, lw=1.7, label=name)
        titles = ("loss along the step", "change of the gradient", "curvature")
        labels = (
            "training loss, lowest to highest",
            "largest ‖∇L(w + αΔw) − ∇L(w)‖ (GC: of Φ(∇L))",
            "top |eigenvalue| of ∇²L (GC: of P∇²LP)",
        )
        for axis, title, label in zip(axes, titles, labels, strict=True):
            axis.set_yscale("log")
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_ylabel(label, fontsize=8.5)
            axis.set_xlabel("step")
        handles, names = axes[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
        return figure
