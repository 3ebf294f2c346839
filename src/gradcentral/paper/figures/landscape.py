"""Loss, gradient and curvature along the steps of training, with and without GC."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import NONE
from gradcentral.layout import WeightLayout
from gradcentral.paper.figure import Figure
from gradcentral.paper.hessian import top_eigenvalue
from gradcentral.paper.study import Study, TrainingStep
from gradcentral.plotting import STYLES, Theme, new_figure, style
from gradcentral.projection import center

__all__ = ["landscape_figure"]

_ARMS = (NONE, "gradient")
# In multiples of the optimizer's step. Santurkar et al. 2018 move along the gradient instead.
_REACH = (0.25, 0.5, 1.0, 2.0, 4.0)
_POINTS = 24
# A product with the Hessian costs a few passes over the batch, and 1 % is below the width of a line.
_TOLERANCE, _ITERATIONS = 1e-2, 30


class _Point(NamedTuple):
    arm: str
    step: int
    loss_low: float
    loss_high: float
    gradient_change: float
    curvature: float


def landscape_figure(study: Study) -> Figure:
    """How the loss and its gradient vary along the steps of training, which theorem 4.2 bounds at fixed weights."""
    points: list[_Point] = []
    every = max(1, study.steps // _POINTS)
    for arm in _ARMS:
        last: TrainingStep | None = None
        start: list[Tensor] = []
        for step in study.train(arm, study.seed):
            if last is not None:
                # Only now the optimizer has made the last step.
                points.append(_measure(study, arm, last, start))
                last = None
            if step.number % every == 0:
                last, start = step, [w.detach().clone() for w in step.model.parameters()]
    return Figure(
        f"{study.task.name}, {study.optimizer}: the loss along training, with and without GC",
        lambda theme: _draw(points, theme),
        _Point._fields,
        points,
    )


def _measure(study: Study, arm: str, step: TrainingStep, start: list[Tensor]) -> _Point:
    """Measure a step that the optimizer has made, on its batch, from its start to `_REACH` times its length."""
    model, layout, loss_function = step.model, step.layout if arm != NONE else None, study.task.loss
    losses, gradients = [], []
    with preserve_state(model):
        change = [after.detach() - before for after, before in zip(model.parameters(), start, strict=True)]
        _set_weights(model, start)
        options: dict[str, Any] = {"tolerance": _TOLERANCE, "max_iterations": _ITERATIONS}
        curvature = top_eigenvalue(model, loss_function, step.batch, layout=layout, **options)
        for reach in (0.0, *_REACH):
            if reach > 0:
                _set_weights(model, [before + reach * delta for before, delta in zip(start, change, strict=True)])
            torch.manual_seed(0)  # the same dropout at every point
            loss = loss_of(model, loss_function, step.batch)
            losses.append(float(loss.detach()))
            gradients.append(_gradient(model, loss, layout))
    finite = [loss for loss in losses if math.isfinite(loss)] or losses[:1]
    moved = max(float((gradient - gradients[0]).norm()) for gradient in gradients)
    return _Point(arm, step.number, min(finite), max(finite), moved, abs(curvature.value))


def _set_weights(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for w, value in zip(model.parameters(), values, strict=True):
            w.copy_(value)


def _gradient(model: nn.Module, loss: Tensor, layout: WeightLayout | None) -> Tensor:
    """The gradient that the optimizer receives, flat: centered if there is a layout."""
    trained = [w for w in model.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
    parts = [
        center(g.to_dense(), layout[w]) if layout is not None and w in layout else g.to_dense()
        for w, g in zip(trained, gradients, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])


def _draw(points: list[_Point], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 3.7)
        axes = figure.subplots(1, 3)
        for arm in _ARMS:
            mine = [point for point in points if point.arm == arm]
            steps, color, name = [p.step for p in mine], theme.arms[arm], "without GC" if arm == NONE else "with GC"
            lows, highs = [p.loss_low for p in mine], [p.loss_high for p in mine]
            axes[0].fill_between(steps, lows, highs, color=color, alpha=0.3, lw=0)
            for losses in (lows, highs):
                axes[0].plot(steps, losses, STYLES[arm], color=color, lw=0.9)
            axes[1].plot(steps, [p.gradient_change for p in mine], STYLES[arm], color=color, lw=1.7, label=name)
            axes[2].plot(steps, [p.curvature for p in mine], STYLES[arm], color=color, lw=1.7)
        titles = ("range of the loss along a step", "change of the gradient", "curvature")
        labels = (
            "training loss, lowest to highest",
            "max ‖∇L(w+αΔw) − ∇L(w)‖ (GC: Φ(∇L))",
            "top |eigenvalue| of ∇²L (GC: P∇²LP)",
        )
        for axis, title, label in zip(axes, titles, labels, strict=True):
            axis.set_yscale("log")
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axis.set_ylabel(label, fontsize=8)
            axis.set_xlabel("step")
        handles, names = axes[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
        return figure
