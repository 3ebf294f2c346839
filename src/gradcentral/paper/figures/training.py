"""Figures of training: learning curves, and loss, gradient and curvature along its steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.plots import Series, draw_series, scale
from gradcentral.experiment.run_comparison import compare
from gradcentral.layout import WeightLayout
from gradcentral.paper.figure import Figure, drawing, plot_arm, put_legend
from gradcentral.paper.hessian import top_eigenvalue
from gradcentral.paper.study import GRADIENT_ARMS, Study, TrainingStep
from gradcentral.plotting import LIGHT
from gradcentral.projection import center

__all__ = ["landscape_figure", "learning_figure"]

# In multiples of the optimizer's step. Santurkar et al. 2018 move along the gradient instead.
_REACH = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_POINTS = 24
# A product with the Hessian costs a few passes over the batch, and 1 % is below the width of a line.
_LANCZOS: dict[str, Any] = {"tolerance": 1e-2, "max_iterations": 30}


def learning_figure(study: Study) -> Figure:
    """Training loss and test metric of all arms by epoch, as Figures 5 to 7 of the paper show for its data sets.

    The runs are those of a comparison, which shows its own progress and keeps finished runs in ``study.runs``.
    """
    options: dict[str, Any] = {"device": study.device, "out": study.runs, "progress": study.progress}
    comparison = compare(study.source, seeds=study.seeds, epochs=study.epochs, optimizers=[study.optimizer], **options)
    with drawing(3.7) as image:
        axes = image.subplots(1, 2)
        metric = Series(f"test {comparison.metric}", "test_metric", "late")
        for axis, series in zip(axes, (Series("training loss", "train_loss", "log"), metric), strict=True):
            scale(axis, series, draw_series(axis, comparison, study.optimizer, series, LIGHT))
            axis.set_ylabel(series.label)
            axis.set_title(series.label.capitalize(), loc="left", fontweight="bold")
        put_legend(image, axes[0])
    title = f"{study.task.name}, {study.optimizer}: learning curves, mean and 95% interval of {study.seed_label}"
    numbers = ("train_loss", "test_loss", "test_metric", "share", "gradient_norm", "centered_norm", "drift")
    epochs = [(run.arm, run.seed, epoch) for run in comparison.all_runs for epoch in run.epochs]
    rows = [(arm, seed, epoch["epoch"], *map(epoch.get, numbers)) for arm, seed, epoch in epochs]
    return Figure(title, image, ("arm", "seed", "epoch", *numbers), rows)


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
    for arm in GRADIENT_ARMS:
        last: TrainingStep | None = None
        start: list[Tensor] = []
        for step in study.train(arm, study.seed):
            if last is not None:
                # Only now the optimizer has made the last step.
                points.append(_measure(study, arm, last, start))
                last = None
            if step.number % every == 0:
                last, start = step, [w.detach().clone() for w in step.model.parameters()]
    title = f"{study.task.name}, {study.optimizer}: the loss along training, with and without GC"
    return Figure(title, _draw_landscape(points), _Point._fields, points)


def _measure(study: Study, arm: str, step: TrainingStep, start: list[Tensor]) -> _Point:
    """Measure a step that the optimizer has made, on its batch, from its start to `_REACH` times its length."""
    model, layout, loss_function = step.model, step.layout if arm != NONE else None, study.task.loss
    losses, gradients = [], []
    with preserve_state(model):
        change = [after.detach() - before for after, before in zip(model.parameters(), start, strict=True)]
        for reach in _REACH:
            with torch.no_grad():
                for w, before, delta in zip(model.parameters(), start, change, strict=True):
                    w.copy_(before + reach * delta if reach > 0 else before)
            if reach == 0:
                curvature = top_eigenvalue(model, loss_function, step.batch, layout=layout, **_LANCZOS)
            torch.manual_seed(0)  # the same dropout at every point
            loss = loss_of(model, loss_function, step.batch)
            losses.append(float(loss.detach()))
            gradients.append(_gradient(model, loss, layout))
    finite = [loss for loss in losses if math.isfinite(loss)] or losses[:1]
    moved = max(float((gradient - gradients[0]).norm()) for gradient in gradients)
    return _Point(arm, step.number, min(finite), max(finite), moved, abs(curvature.value))


def _gradient(model: nn.Module, loss: Tensor, layout: WeightLayout | None) -> Tensor:
    """The gradient that the optimizer receives, flat: centered if there is a layout."""
    trained = [w for w in model.parameters() if w.requires_grad]
    gradients = [g.to_dense() for g in torch.autograd.grad(loss, trained, materialize_grads=True)]
    parts = zip(trained, gradients, strict=True)
    return torch.cat([(center(g, layout[w]) if layout and w in layout else g).flatten() for w, g in parts])


def _draw_landscape(points: list[_Point]) -> Any:
    panels = (
        ("range of the loss along a step", "training loss, lowest to highest", ("loss_low", "loss_high")),
        ("change of the gradient", "max ‖∇L(w+αΔw) − ∇L(w)‖ (GC: Φ(∇L))", ("gradient_change",)),
        ("curvature", "top |eigenvalue| of ∇²L (GC: P∇²LP)", ("curvature",)),
    )
    with drawing(3.7) as image:
        axes = image.subplots(1, 3)
        for axis, (title, label, fields) in zip(axes, panels, strict=True):
            for arm, name in zip(GRADIENT_ARMS, ("without GC", "with GC"), strict=True):
                shown = [point for point in points if point.arm == arm]
                steps, lines = [p.step for p in shown], [[getattr(p, field) for p in shown] for field in fields]
                for line in lines:
                    plot_arm(axis, arm, steps, line, lw=1.7 if len(lines) == 1 else 0.9, label=name)
                if len(lines) > 1:
                    axis.fill_between(steps, *lines, color=LIGHT.arms[arm], alpha=0.3, lw=0)
            axis.set_yscale("log")
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axis.set_ylabel(label, fontsize=8)
            axis.set_xlabel("step")
        put_legend(image, axes[1])
    return image
