"""L2 norm and largest entry of the gradient along training, with and without GC."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradcentral.diagnostics.centering_effect import combine_effects, effects
from gradcentral.experiment.arms import NONE
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study, TrainingStep, gradient_of, layer_label
from gradcentral.plotting import STYLES, Theme, new_figure, style

__all__ = ["gradient_norms_figure"]

_ARMS = (NONE, "gradient")
_QUARTILES = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
_COLUMNS = ("norm_median", "norm_low", "norm_high", "largest_median", "largest_low", "largest_high")


def gradient_norms_figure(study: Study) -> Figure:
    """Figure 4 of the paper: the gradient that the optimizer receives, ∇L without GC and Φ(∇L) with it."""
    labels = {entry.name: layer_label(entry) for entry in study.example_layers}
    places = [*labels.values(), "whole network"]
    values = {}
    for arm in _ARMS:
        runs = [[_numbers(step, arm, labels) for step in study.train(arm, seed)] for seed in study.seeds]
        values[arm] = torch.tensor(runs, dtype=torch.float64)  # [seeds, steps, places, 2]
    return Figure(
        f"{study.task.name}, {study.optimizer}: the gradient that the optimizer receives, {study.seed_label}",
        lambda theme: _draw(places, values, theme),
        ("place", "arm", "step", *_COLUMNS),
        [
            (place, arm, step, *row)
            for arm, runs in values.items()
            for place, steps in zip(places, torch.quantile(runs, _QUARTILES, dim=0).permute(2, 1, 3, 0), strict=True)
            for step, row in enumerate(steps.flatten(1).tolist())
        ],
    )


def _numbers(step: TrainingStep, arm: str, names: Iterable[str]) -> list[list[float]]:
    """Norm and largest entry of the gradient that the optimizer receives, of each named layer and of all parameters."""
    trained = [entry for entry in step.layout.entries if entry.parameter.requires_grad]
    gradients = [(gradient_of(entry.parameter), None if arm == NONE else entry.vectors) for entry in trained]
    parts = dict(zip((entry.name for entry in trained), effects(gradients), strict=True))
    shown = [*(parts[name] for name in names), combine_effects([*parts.values()])]
    return [[effect.centered_norm, effect.centered_largest] for effect in shown]


def _draw(places: list[str], values: dict[str, Tensor], theme: Theme) -> Any:
    steps = values[NONE].shape[1]
    width = max(1, steps // 70)
    with style(theme):
        figure = new_figure(9.8, 5.2)
        axes = figure.subplots(2, len(places), squeeze=False, sharex=True)
        for row, axis_row in enumerate(axes):
            for place, axis in enumerate(axis_row):
                for arm in _ARMS:
                    median, low, high = _smoothed(values[arm][:, :, place, row], width)
                    at = [start + (width - 1) / 2 for start in range(0, steps, width)]
                    name = "∇L, without GC" if arm == NONE else "Φ(∇L), with GC"
                    axis.plot(at, median, STYLES[arm], color=theme.arms[arm], lw=1.6, label=name)
                    axis.fill_between(at, low, high, color=theme.arms[arm], alpha=0.15, lw=0)
                axis.set_yscale("log")
        for place, top, bottom in zip(places, *axes, strict=True):
            top.set_title(place, loc="left", fontweight="bold")
            bottom.set_xlabel("step" if width == 1 else f"step ({width} steps per point)")
        axes[0][0].set_ylabel("L2 norm")
        axes[1][0].set_ylabel("largest |entry|")
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
        return figure


def _smoothed(values: Tensor, width: int) -> list[list[float]]:
    """The quartiles over the seeds and over ``width`` neighboring steps; zeros have no place on a logarithmic axis."""
    windows = torch.split(values.where(values > 0, math.nan), width, dim=1)
    return torch.stack([torch.nanquantile(window.flatten(), _QUARTILES) for window in windows], dim=1).tolist()
