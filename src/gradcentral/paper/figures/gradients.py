"""Figures of the gradient before and after centering."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradcentral.diagnostics.centering_effect import combine_effects, effects
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.probing import probe_task
from gradcentral.paper.figure import Figure, drawing, plot_arm, put_legend
from gradcentral.paper.gradients import as_rows
from gradcentral.paper.study import GRADIENT_ARMS, Study, TrainingStep, gradient_of, layer_label
from gradcentral.plotting import LIGHT
from gradcentral.projection import center

__all__ = ["gradient_norms_figure", "operation_figure", "shares_figure"]

# More rows or columns than this cannot be distinguished at the size of a page.
_UNITS, _WEIGHTS = 24, 72
_QUARTILES = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
_COLUMNS = ("norm_median", "norm_low", "norm_high", "largest_median", "largest_low", "largest_high")


def operation_figure(study: Study) -> Figure:
    """Figure 1 of the paper: Φ as matrices before and after, with the real gradients of the first training step."""
    (step,) = study.train(NONE, study.seed, steps=1)
    layers, numbers = study.example_layers, []
    with drawing(0.4 + 2.9 * len(layers)) as image:
        for entry, panel in zip(layers, image.subfigures(len(layers), 1, squeeze=False).flat, strict=True):
            parameter = step.model.get_parameter(entry.name)
            g, vectors, label = gradient_of(parameter).cpu(), step.layout[parameter], layer_label(entry)
            rows, centered = as_rows(g, vectors), as_rows(center(g, vectors), vectors)
            # The units with the longest gradients, in the layer's order: many of the others would be blank.
            units = rows.norm(dim=1).topk(min(_UNITS, vectors.count)).indices.sort().values
            shown = min(_WEIGHTS, vectors.fan_in)
            before, after = rows[units, :shown], centered[units, :shown]
            part = f"{len(units)} of {vectors.count} units, {shown} of {vectors.fan_in} weights"
            panel.suptitle(f"{label}: {part}", x=0.01, ha="left", fontsize=10)
            _draw_operation(panel, before, after, rows[units].mean(1).tolist())
            pairs = enumerate(torch.stack([before, after], dim=-1).tolist())
            numbers += [(label, unit, weight, *pair) for unit, row in pairs for weight, pair in enumerate(row)]
    title = f"{study.task.name}: the gradient of each weight vector before and after centering"
    return Figure(title, image, ("layer", "unit_row", "weight", "gradient", "centered"), numbers)


def _draw_operation(panel: Any, before: Tensor, after: Tensor, means: list[float]) -> None:
    panel.set_facecolor("none")
    *matrices, bar, bars = panel.subplots(1, 4, width_ratios=[10, 10, 0.4, 3.2])
    both = torch.cat([before, after]).abs()
    # With the full range of colors, a few extreme entries would leave all others pale.
    reach = float(both.quantile(0.995)) or float(both.max()) or 1.0
    for axis, matrix, title in zip(matrices, (before, after), ("∇L", "Φ(∇L) = P∇L"), strict=True):
        colors = axis.imshow(matrix.tolist(), cmap="RdBu_r", aspect="auto", interpolation="none")
        colors.set_clim(-reach, reach)
        axis.grid(visible=False)
        axis.set_title(title, loc="left")
        axis.set_xlabel("weight")
    matrices[0].set_ylabel("output unit")
    matrices[1].set_yticks([])
    panel.colorbar(colors, cax=bar).outline.set_visible(False)
    bar.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    bars.barh(range(len(means)), means, color=LIGHT.arms["none"], height=0.8)
    bars.axvline(0, color=LIGHT.arms["gradient"], lw=2.5)
    bars.set(ylim=(len(means) - 0.5, -0.5), yticks=[])
    bars.set_title("means", loc="left")
    bars.set_xlabel("gray ∇L, blue Φ(∇L)", fontsize=9, labelpad=14)
    bars.ticklabel_format(axis="x", scilimits=(0, 0), useMathText=True)


def gradient_norms_figure(study: Study) -> Figure:
    """Figure 4 of the paper: L2 norm and largest entry of the gradient that the optimizer receives, along training."""
    labels = {entry.name: layer_label(entry) for entry in study.example_layers}
    places = [*labels.values(), "whole network"]
    values, rows = {}, []
    for arm in GRADIENT_ARMS:
        runs = [[_norms(step, arm, labels) for step in study.train(arm, seed)] for seed in study.seeds]
        values[arm] = torch.tensor(runs, dtype=torch.float64)  # [seeds, steps, places, 2]
        quartiles = torch.quantile(values[arm], _QUARTILES, dim=0).permute(2, 1, 3, 0).flatten(2).tolist()
        by_place = zip(places, quartiles, strict=True)
        rows += [(place, arm, step, *numbers) for place, steps in by_place for step, numbers in enumerate(steps)]
    title = f"{study.task.name}, {study.optimizer}: the gradient that the optimizer receives, {study.seed_label}"
    return Figure(title, _draw_norms(places, values), ("place", "arm", "step", *_COLUMNS), rows)


def _norms(step: TrainingStep, arm: str, names: Iterable[str]) -> list[list[float]]:
    """Norm and largest entry of the gradient that the optimizer receives, of each named layer and of all parameters."""
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
                for arm, name in zip(GRADIENT_ARMS, ("∇L, without GC", "Φ(∇L), with GC"), strict=True):
                    median, low, high = _smoothed(values[arm][:, :, place, row], width)
                    plot_arm(axis, arm, at, median, lw=1.6, label=name)
                    axis.fill_between(at, low, high, color=LIGHT.arms[arm], alpha=0.15, lw=0)
                axis.set_yscale("log")
            axes[0][place].set_title(title, loc="left", fontweight="bold")
            axes[1][place].set_xlabel("step" if width == 1 else f"step ({width} steps per point)")
        axes[0][0].set_ylabel("L2 norm")
        axes[1][0].set_ylabel("largest |entry|")
        put_legend(image, axes[0][0])
    return image


def _smoothed(values: Tensor, width: int) -> list[list[float]]:
    """The quartiles over the seeds and over ``width`` neighboring steps; zeros have no place on a logarithmic axis."""
    windows = torch.split(values.where(values > 0, math.nan), width, dim=1)
    return torch.stack([torch.nanquantile(window.flatten(), _QUARTILES) for window in windows], dim=1).tolist()


def shares_figure(study: Study) -> Figure:
    """The share of each layer's gradient that GC removes before training: the plot of `gradcentral.probe`."""
    (report,) = study.track((probe_task(study.task, seed=seed, device=study.device) for seed in (study.seed,)), 1)
    columns = ("name", "kind", "share", "spread", "finding")
    rows = [[getattr(layer, column) for column in columns] for layer in report.layers]
    return Figure(f"{study.task.name}: where GC acts before training", report.plot(LIGHT), columns, rows)
