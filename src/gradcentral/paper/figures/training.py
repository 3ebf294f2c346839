"""The figures of training: a neuron's trajectory, the gradient, the learning curves, and the loss around each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.centering_effect import combine_effects, effects
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import ARMS, NONE
from gradcentral.experiment.report import Series, draw_series, scale
from gradcentral.experiment.run_comparison import compare
from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import as_rows
from gradcentral.paper.hessian import top_eigenvalue
from gradcentral.paper.study import Figure, Study, TrainingStep, drawing, gradient_of, layer_label, put_legend
from gradcentral.plotting import LIGHT, STYLES
from gradcentral.projection import center

__all__ = ["geometry_figure", "gradient_norms_figure", "landscape_figure", "learning_figure"]

# The arms of the figures that compare gradients with and without GC.
_ARMS = (NONE, "gradient")
_QUARTILES = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64, device="cpu")
_COLUMNS = ("norm_median", "norm_low", "norm_high", "largest_median", "largest_low", "largest_high")
# In multiples of the optimizer's step. Santurkar et al. 2018 move along the gradient instead.
_REACH = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_POINTS = 24
# A product with the Hessian costs a few passes over the batch, and an error of 1 % is less than the width of a line.
_LANCZOS: dict[str, Any] = {"tolerance": 1e-2, "max_iterations": 30}


def geometry_figure(study: Study) -> Figure:
    """Draw figure 2 of the paper: the trajectory of a real neuron, and the hyperplane on which GC keeps it.

    The neuron is the one in the largest linear layer whose first gradient has the largest mean; GC changes it most.
    """
    name = study.example_layers[-1].name
    changes, unit = {}, -1
    for arm in ARMS:
        weights = []
        for step in study.train(arm, study.seeds[0]):
            parameter = step.model.get_parameter(name)
            vectors = step.layout[parameter]
            if unit < 0:
                unit = int(as_rows(gradient_of(parameter), vectors).mean(1).abs().argmax())
            weights.append(as_rows(parameter.detach(), vectors)[unit].cpu().double().clone())
        changes[arm] = torch.stack(weights) - weights[0]
    fan_in = len(weights[0])
    e = torch.full((fan_in,), 1 / math.sqrt(fan_in), dtype=torch.float64, device="cpu")
    within = torch.cat([change - torch.outer(change @ e, e) for change in changes.values()])
    # The axes are the two directions within the hyperplane in which the trajectories spread most, and e.
    directions = torch.linalg.svd(within, full_matrices=False).Vh
    axes = torch.stack([directions[0], directions[min(1, len(directions) - 1)], e])
    paths = {arm: (change @ axes.T).tolist() for arm, change in changes.items()}
    title = f"{study.task.name}, {study.optimizer}: neuron {unit} of {name} ({fan_in} weights) in {study.steps} steps"
    rows = [(arm, step, *point) for arm, path in paths.items() for step, point in enumerate(path)]
    return Figure(title, _draw_paths(paths), ("arm", "step", "within_1", "within_2", "along_e"), rows)


def _draw_paths(paths: dict[str, list[list[float]]]) -> Any:
    with drawing(4.6) as image:
        grid = image.add_gridspec(1, 2, width_ratios=[1.25, 1])
        space = image.add_subplot(grid[0], projection="3d", computed_zorder=False)
        distance = image.add_subplot(grid[1])
        points = [point for path in paths.values() for point in path]
        every = torch.tensor(points, dtype=torch.float64, device="cpu")
        low, high = every.min(0).values, every.max(0).values
        pad = 0.15 * (high - low).clamp_min(1e-12)
        (x0, y0, _), (x1, y1, _) = (low - pad).tolist(), (high + pad).tolist()
        plane = [[[x0, x1], [x0, x1]], [[y0, y0], [y1, y1]], [[0.0, 0.0], [0.0, 0.0]]]
        corners = torch.tensor(plane, dtype=torch.float64, device="cpu").numpy()
        space.plot_surface(*corners, color=LIGHT.faint, alpha=0.55, zorder=0, shade=False)
        for arm, path in paths.items():
            x, y, z = zip(*path, strict=True)
            space.plot(x, y, z, STYLES[arm], color=LIGHT.arms[arm], lw=1.4, zorder=2)
            space.plot(x[-1:], y[-1:], z[-1:], "o", color=LIGHT.arms[arm], ms=6, zorder=3)
            distance.plot(range(len(z)), z, STYLES[arm], color=LIGHT.arms[arm], lw=1.4, label=arm)
        space.plot([0], [0], [0], "s", color=LIGHT.text, ms=6, zorder=4)
        space.text(0, 0, 0, " w⁰", zorder=5, color=LIGHT.text)
        space.set_xlabel("1st direction in the plane", labelpad=2)
        space.set_ylabel("2nd direction in the plane", labelpad=2)
        space.tick_params(labelsize=8, pad=0)
        space.view_init(elev=18, azim=-55)
        space.set_box_aspect((1.2, 1.2, 0.9), zoom=1.05)
        space.set_title("gray: the hyperplane eᵀ(w − w⁰) = 0; height: eᵀ(w − w⁰)", loc="left", fontsize=10)
        for axis in (space.xaxis, space.yaxis, space.zaxis):
            axis.set_pane_color((0, 0, 0, 0))
            axis._axinfo["grid"]["color"] = LIGHT.faint
        distance.set(xlabel="step", ylabel="eᵀ(w − w⁰)")
        distance.set_title("distance from the hyperplane", loc="left", fontsize=10)
        distance.legend(frameon=False)
    return image


def gradient_norms_figure(study: Study) -> Figure:
    """Draw figure 4 of the paper: L2 norm and largest entry of the gradient that the optimizer receives."""
    labels = {entry.name: layer_label(entry) for entry in study.example_layers}
    places = [*labels.values(), "whole network"]
    values, rows = {}, []
    for arm in _ARMS:
        runs = [[_norms(step, arm, labels) for step in study.train(arm, seed)] for seed in study.seeds]
        values[arm] = torch.tensor(runs, dtype=torch.float64, device="cpu")  # [seeds, steps, places, 2]
        quartiles = torch.quantile(values[arm], _QUARTILES, dim=0).permute(2, 1, 3, 0).flatten(2).tolist()
        by_place = zip(places, quartiles, strict=True)
        rows += [(place, arm, step, *numbers) for place, steps in by_place for step, numbers in enumerate(steps)]
    title = f"{study.task.name}, {study.optimizer}: the gradient that the optimizer receives, {study.seed_label}"
    return Figure(title, _draw_norms(places, values), ("place", "arm", "step", *_COLUMNS), rows)


def _norms(step: TrainingStep, arm: str, names: Iterable[str]) -> list[list[float]]:
    """Measure norm and largest entry of the gradient that the optimizer receives, per named layer and in total."""
    trained = [entry for entry in step.layout.entries if entry.parameter.requires_grad]
    gradients = [(gradient_of(entry.parameter), None if arm == NONE else entry.vectors) for entry in trained]
    parts = dict(zip((entry.name for entry in trained), effects(gradients), strict=True))
    shown = [*(parts[name] for name in names), combine_effects([*parts.values()])]
    return [[effect.centered_norm, effect.centered_largest] for effect in shown]


def _draw_norms(places: list[str], values: dict[str, Tensor]) -> Any:
    steps = values[NONE].shape[1]
    width = max(1, steps // 70)
    at = [start + (width - 1) / 2 for start in range(0, steps, width)]
    with drawing(5.2) as image:
        axes = image.subplots(2, len(places), squeeze=False, sharex=True)
        for place, title in enumerate(places):
            for row, axis in enumerate(axes[:, place]):
                for arm, name in zip(_ARMS, ("∇L, without GC", "Φ(∇L), with GC"), strict=True):
                    median, low, high = _smoothed(values[arm][:, :, place, row], width)
                    axis.plot(at, median, STYLES[arm], color=LIGHT.arms[arm], lw=1.6, label=name)
                    axis.fill_between(at, low, high, color=LIGHT.arms[arm], alpha=0.15, lw=0)
                axis.set_yscale("log")
            axes[0][place].set_title(title, loc="left", fontweight="bold")
            axes[1][place].set_xlabel("step" if width == 1 else f"step ({width} steps per point)")
        axes[0][0].set_ylabel("L2 norm")
        axes[1][0].set_ylabel("largest |entry|")
        put_legend(image, axes[0][0])
    return image


def _smoothed(values: Tensor, width: int) -> list[list[float]]:
    """Compute quartiles over the seeds and ``width`` neighboring steps, without zeros, for a logarithmic axis."""
    windows = torch.split(values.where(values > 0, math.nan), width, dim=1)
    return torch.stack([torch.nanquantile(window.flatten(), _QUARTILES) for window in windows], dim=1).tolist()


def learning_figure(study: Study) -> Figure:
    """Draw learning curves of a comparison of all arms, as in figures 5 to 7 of the paper for its data sets."""
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
    """Draw the variation of the loss and its gradient along training steps (theorem 4.2 bounds it at fixed weights)."""
    points: list[_Point] = []
    every = max(1, study.steps // _POINTS)
    for arm in _ARMS:
        last: tuple[TrainingStep, list[Tensor]] | None = None
        for step in study.train(arm, study.seeds[0]):
            if last is not None:  # the optimizer has taken the last step only now
                points.append(_measure(study, arm, *last))
            starts_here = step.number % every == 0
            last = (step, [w.detach().clone() for w in step.model.parameters()]) if starts_here else None
    title = f"{study.task.name}, {study.optimizer}: the loss along training, with and without GC"
    return Figure(title, _draw_landscape(points), _Point._fields, points)


def _measure(study: Study, arm: str, step: TrainingStep, start: list[Tensor]) -> _Point:
    """Measure a step that the optimizer has taken, on its batch, from its start to `_REACH` times its length."""
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
            torch.manual_seed(0)  # use the same dropout at every point
            loss = loss_of(model, loss_function, step.batch)
            losses.append(float(loss.detach()))
            gradients.append(_gradient(model, loss, layout))
    finite = [loss for loss in losses if math.isfinite(loss)] or losses[:1]
    moved = max(float((gradient - gradients[0]).norm()) for gradient in gradients)
    return _Point(arm, step.number, min(finite), max(finite), moved, abs(curvature.value))


def _gradient(model: nn.Module, loss: Tensor, layout: WeightLayout | None) -> Tensor:
    """Compute the gradient that the optimizer receives, flat, and centered if there is a layout."""
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
            for arm, name in zip(_ARMS, ("without GC", "with GC"), strict=True):
                shown = [point for point in points if point.arm == arm]
                steps, lines = [p.step for p in shown], [[getattr(p, field) for p in shown] for field in fields]
                color, width = LIGHT.arms[arm], 1.7 if len(lines) == 1 else 0.9
                for line in lines:
                    axis.plot(steps, line, STYLES[arm], color=color, lw=width, label=name)
                if len(lines) > 1:
                    axis.fill_between(steps, *lines, color=color, alpha=0.3, lw=0)
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axis.set_ylabel(label, fontsize=8)
            axis.set(yscale="log", xlabel="step")
        put_legend(image, axes[1])
    return image
