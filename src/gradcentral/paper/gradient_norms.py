"""Length and largest entry of the gradient along training, with and without GC."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from gradcentral.diagnostics.centering_effect import combine_effects, effects
from gradcentral.experiment.arms import NONE
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study, gradient_of, kind_of
from gradcentral.plotting import STYLES, Theme, new_figure, style

__all__ = ["gradient_norms"]

_ARMS = (NONE, "gradient")
_WHOLE = "whole network"
_Key = tuple[str, str, int]


def gradient_norms(study: Study) -> Figure:
    """Figures 4 and 5 of the paper: what the optimizer is given, ∇L without GC and Φ(∇L) with it."""
    names = {entry.name: f"{kind_of(entry)} {entry.name}" for entry in study.examples}
    norms: dict[_Key, list[float]] = defaultdict(list)
    largest: dict[_Key, list[float]] = defaultdict(list)
    for seed in study.seeds:
        for arm in _ARMS:
            for moment in study.track(study.train(arm, seed), study.steps):
                entries = [entry for entry in moment.layout.entries if entry.parameter.requires_grad]
                seen = effects([(gradient_of(entry.parameter), entry.vectors) for entry in entries])
                shown = {names[e.name]: effect for e, effect in zip(entries, seen, strict=True) if e.name in names}
                for place, effect in (shown | {_WHOLE: combine_effects(seen)}).items():
                    centered = arm != NONE
                    norms[place, arm, moment.step].append(effect.centered_norm if centered else effect.norm)
                    largest[place, arm, moment.step].append(effect.centered_largest if centered else effect.largest)
    places = [*names.values(), _WHOLE]
    return Figure(
        f"{study.task.name}, {study.optimizer}: the gradient that the optimizer is given, {study.runs}",
        lambda theme: _draw(places, norms, largest, study.steps, theme),
        (
            "place",
            "arm",
            "step",
            "norm_median",
            "norm_low",
            "norm_high",
            "largest_median",
            "largest_low",
            "largest_high",
        ),
        [(*key, *_spread(norms[key]), *_spread(largest[key])) for key in norms],
    )


def _draw(
    places: list[str], norms: dict[_Key, list[float]], largest: dict[_Key, list[float]], steps: int, theme: Theme
) -> Any:
    width = max(1, steps // 70)
    with style(theme):
        figure = new_figure(9.8, 5.2)
        axes = figure.subplots(2, len(places), squeeze=False, sharex=True)
        for row, values, label in zip(axes, (norms, largest), ("L2 norm", "largest |entry|"), strict=True):
            for axis, place in zip(row, places, strict=True):
                for arm in _ARMS:
                    at, medians, lows, highs = _smoothed(values, place, arm, steps, width)
                    name = "∇L, without GC" if arm == NONE else "Φ(∇L), with GC"
                    axis.plot(at, medians, STYLES[arm], color=theme.arms[arm], lw=1.6, label=name)
                    axis.fill_between(at, lows, highs, color=theme.arms[arm], alpha=0.15, lw=0)
                axis.set_yscale("log")
            row[0].set_ylabel(label)
        for axis, place in zip(axes[0], places, strict=True):
            axis.set_title(place, loc="left", fontweight="bold")
        for axis in axes[1]:
            axis.set_xlabel("step" if width == 1 else f"step (each point: {width})")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        return figure


def _smoothed(
    values: dict[_Key, list[float]], place: str, arm: str, steps: int, width: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Median and quartiles over the seeds and over ``width`` neighboring steps; zeros are too small to show."""
    points = []
    for begin in range(0, steps, width):
        window = [v for step in range(begin, min(begin + width, steps)) for v in values[place, arm, step] if v > 0]
        if window:
            points.append((begin + (width - 1) / 2, *_spread(window)))
    at, medians, lows, highs = zip(*points, strict=True) if points else ((), (), (), ())
    return list(at), list(medians), list(lows), list(highs)


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
