"""The records of a training as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradcentral.diagnostics.record import Record
from gradcentral.extras import optional
from gradcentral.plotting import LIGHT, Theme, new_figure, style

__all__ = ["history"]

_NAMED_AT_MOST = 40
"""Layers; where there are more, some of their names are left out."""


def history(records: Sequence[Record], theme: Theme = LIGHT) -> Any:
    """Gradient, drift and sensitivity of the whole net by step, and the share of each layer.

    Args:
        records: of `Monitor`, in memory or read from a file.
        theme: colors.

    Returns:
        A ``matplotlib.figure.Figure``: show it in a notebook, or ``figure.savefig("gc.png")``.

    Raises:
        ValueError: there is no record.
        MissingExtraError: matplotlib is not installed.

    Examples:
        >>> from gradcentral.diagnostics.record import Reading
        >>> figure = history([Record(0, None, False, Reading(norm=2.0), {"weight": Reading(share=0.5)})])
        >>> figure.axes[0].get_title("left")
        'Gradient norm'
    """
    if not records:
        raise ValueError("records: there are none yet; the first is made at the first step")
    names = list(dict.fromkeys(name for record in records for name in record.layers))
    with style(theme):
        shares = 0.8 + 0.2 * min(len(names), _NAMED_AT_MOST)
        figure = new_figure(10, 6 + shares)
        top, bottom = figure.subfigures(2, 1, height_ratios=[6, shares])
        (norm, largest), (drift, sensitivity) = top.subplots(2, 2, sharex=True)
        _before_and_after(norm, records, "norm", "centered_norm", theme)
        _before_and_after(largest, records, "largest", "centered_largest", theme)
        norm.set_title("Gradient norm", loc="left", fontweight="bold")
        norm.set_ylabel("L2 norm, whole net")
        largest.set_title("Largest entry of the gradient", loc="left", fontweight="bold")
        largest.set_ylabel("absolute value")
        handles, labels = norm.get_legend_handles_labels()
        top.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        _spread(drift, records, ("drift", "whole net"), ("largest_drift", "largest weight vector"), theme)
        drift.set_title("Drift  ‖eᵀ(w − w⁰)‖", loc="left", fontweight="bold")
        drift.set_ylabel("L2 norm")
        largest_unit = ("largest_sensitivity", "largest")
        _spread(sensitivity, records, ("sensitivity", "root mean square"), largest_unit, theme)
        sensitivity.set_title("Sensitivity  |1ᵀw|", loc="left", fontweight="bold")
        sensitivity.set_ylabel("per output unit")
        for axis in (drift, sensitivity):
            axis.set_xlabel("steps taken")
            axis.legend(frameon=False)
        if names:
            _shares(bottom, records, names, theme)
        return figure


def _before_and_after(axis: Any, records: Sequence[Record], before: str, after: str, theme: Theme) -> None:
    steps = [record.step for record in records]
    placements = " / ".join(dict.fromkeys(record.placement for record in records if record.placement))
    axis.plot(steps, _values(records, before), "--", color=theme.arms["none"], lw=1.3, label="before centering")
    label = f"after centering ({placements})" if placements else "as centering would make it"
    axis.plot(steps, _values(records, after), "-", color=theme.arms["gradient"], lw=1.3, label=label)
    if any(value > 0 for value in _values(records, before)):
        axis.set_yscale("log")


def _spread(
    axis: Any, records: Sequence[Record], whole: tuple[str, str], largest: tuple[str, str], theme: Theme
) -> None:
    """Two numbers, each with its label."""
    steps = [record.step for record in records]
    for line, (name, label) in ((":", largest), ("-", whole)):
        axis.plot(steps, _values(records, name), line, color=theme.arms["update"], lw=1.3, label=label)
    # Rounding alone must not fill the panel.
    axis.set_ylim(0, max(axis.get_ylim()[1], 1e-4))


def _shares(figure: Any, records: Sequence[Record], names: list[str], theme: Theme) -> None:
    """A row a layer, in the model's order, a cell a record."""
    axis = figure.subplots()
    rows = [
        [math.nan if (layer := record.layers.get(name)) is None else _number(layer.share) for record in records]
        for name in names
    ]
    steps = [record.step for record in records]
    # A cell reaches from its record to the next.
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    image = axis.pcolormesh(edges, range(len(names) + 1), rows, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    every = math.ceil(len(names) / _NAMED_AT_MOST)
    axis.set_yticks([at + 0.5 for at in range(0, len(names), every)], names[::every], fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set_title("Share of each gradient's energy that centering removes", loc="left", fontweight="bold")
    axis.set_xlabel("steps taken")
    percent = optional("matplotlib.ticker").PercentFormatter(1)
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=4 + 2 * min(len(names), _NAMED_AT_MOST), format=percent)
    bar.outline.set_visible(False)


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [_number(getattr(record.net, name)) for record in records]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
