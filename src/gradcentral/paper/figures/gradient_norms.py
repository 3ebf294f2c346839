"""L2 norm and largest entry of the gradient along training, with and without GC."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from gradcentral.diagnostics.centering_effect import effects, together
from gradcentral.experiment.arms import NONE
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study, gradient_of, layer_label
from gradcentral.plotting import STYLES, Theme, new_figure, style

__all__ = ["gradient_norms_figure"]

_ARMS = (NONE, "gradient")
_NUMBERS = ("norm", "largest")
_QUARTILES = {"median": 0.5, "low": 0.25, "high": 0.75}


def gradient_norms_figure(study: Study) -> Figure:
    """Figure 4 of the paper: the gradient that the optimizer receives, ∇L without GC and Φ(∇L) with it."""
    labels = {entry.name: layer_label(entry) for entry in study.example_layers}
    found: dict[str, list[float]] = defaultdict(list)
    places = [*labels.values(), "whole network"]
    for arm in _ARMS:
        for seed in study.seeds:
            for step in study.train(arm, seed):
                entries = [entry for entry in step.layout.entries if entry.parameter.requires_grad]
                parts = effects([(gradient_of(entry.parameter), entry.vectors) for entry in entries])
                by_name = {entry.name: effect for entry, effect in zip(entries, parts, strict=True)}
                for effect in (*(by_name[name] for name in labels), together(parts)):
                    found[arm] += (
                        [effect.norm, effect.largest]
                        if arm == NONE
                        else [effect.centered_norm, effect.centered_largest]
                    )
    shape = (len(study.seeds), study.steps, len(places), len(_NUMBERS))
    values = {arm: torch.tensor(numbers, dtype=torch.float64).view(shape) for arm, numbers in found.items()}
    table = {arm: torch.quantile(numbers, _quartiles(), dim=0).permute(2, 1, 3, 0) for arm, numbers in values.items()}
    return Figure(
        f"{study.task.name}, {study.optimizer}: the gradient that the optimizer receives, {study.seed_label}",
        lambda theme: _draw(places, values, theme),
        ("place", "arm", "step", *(f"{number}_{quartile}" for number in _NUMBERS for quartile in _QUARTILES)),
        [
            (place, arm, step, *numbers.flatten().tolist())
            for arm in _ARMS
            for place, steps in zip(places, table[arm], strict=True)
            for step, numbers in enumerate(steps)
        ],
    )


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
    return torch.stack([torch.nanquantile(window.flatten(), _quartiles()) for window in windows], dim=1).tolist()


def _quartiles() -> Tensor:
    return torch.tensor(list(_QUARTILES.values()), dtype=torch.float64)
