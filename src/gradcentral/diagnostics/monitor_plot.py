"""The plot of `Monitor`'s records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradcentral.diagnostics.record import Reading, Record
from gradcentral.extras import optional
from gradcentral.plotting import LIGHT, Theme, new_figure, style

__all__ = ["plot_records"]

_MAX_NAMES = 40


def plot_records(records: Sequence[Record], theme: Theme = LIGHT) -> Any:
    """Draw gradient, drift and sensitivity of the whole net over the steps, and the share of each layer.

    Args:
        records: of `Monitor`, in memory or read from a file.
        theme: colors.

    Returns:
        A ``matplotlib.figure.Figure``: show it in a notebook, or ``figure.savefig("gc.png")``.

    Raises:
        ValueError: there are no records.
        MissingExtraError: matplotlib is not installed.

    Examples:
        >>> figure = plot_records([Record(0, None, False, Reading(norm=2.0), {"weight": Reading(share=0.5)})])
        >>> figure.axes[0].get_title("left")
        'Gradient norm'
    """
    if not records:
        raise ValueError("records: there are none yet; the first one is made at the first step")
    names = list(dict.fromkeys(name for record in records for name in record.layers))
    with style(theme):
        shares_height = 0.8 + 0.2 * min(len(names), _MAX_NAMES)
        figure = new_figure(10, 6 + shares_height)
        top, bottom = figure.subfigures(2, 1, height_ratios=[6, shares_height])
        (norm, largest), (drift, sensitivity) = top.subplots(2, 2, sharex=True)
        _plot_gradient(norm, records, "norm", theme)
        _set_titles(norm, "Gradient norm", "L2 norm, whole net")
        _plot_gradient(largest, records, "largest", theme)
        _set_titles(largest, "Largest entry of the gradient", "absolute value")
        top.legend(*norm.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        _plot_weights(drift, records, "drift", ("whole net", "largest weight vector"), theme)
        _set_titles(drift, "Drift  ‖eᵀ(w − w⁰)‖", "L2 norm")
        _plot_weights(sensitivity, records, "sensitivity", ("root mean square", "largest"), theme)
        _set_titles(sensitivity, "Sensitivity  |1ᵀw|", "per output unit")
        if names:
            _plot_shares(bottom, records, names)
        return figure


def _set_titles(axis: Any, title: str, label: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_ylabel(label)


def _plot_gradient(axis: Any, records: Sequence[Record], name: str, theme: Theme) -> None:
    """Draw a norm of the gradient before and after centering."""
    steps, before = [record.step for record in records], _values(records, name)
    placements = " / ".join(dict.fromkeys(record.placement for record in records if record.placement))
    axis.plot(steps, before, "--", color=theme.arms["none"], lw=1.3, label="before centering")
    label = f"after centering ({placements})" if placements else "if it were centered"
    axis.plot(steps, _values(records, f"centered_{name}"), "-", color=theme.arms["gradient"], lw=1.3, label=label)
    if any(value > 0 for value in before):
        axis.set_yscale("log")


def _plot_weights(axis: Any, records: Sequence[Record], name: str, labels: tuple[str, str], theme: Theme) -> None:
    """Draw a measurement of all weight vectors together, and the largest one."""
    steps, color = [record.step for record in records], theme.arms["update"]
    axis.plot(steps, _values(records, f"largest_{name}"), ":", color=color, lw=1.3, label=labels[1])
    axis.plot(steps, _values(records, name), "-", color=color, lw=1.3, label=labels[0])
    axis.set_ylim(0, max(axis.get_ylim()[1], 1e-4))  # drift that is only rounding stays near the axis
    axis.set_xlabel("steps taken")
    axis.legend(frameon=False)


def _plot_shares(figure: Any, records: Sequence[Record], names: list[str]) -> None:
    """Draw one row per layer, in the model's order, and one cell per record."""
    axis = figure.subplots()
    empty = Reading()
    rows = [[_number(record.layers.get(name, empty).share) for record in records] for name in names]
    steps = [record.step for record in records]
    # A cell extends from its record to the next one.
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    image = axis.pcolormesh(edges, range(len(names) + 1), rows, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    every = math.ceil(len(names) / _MAX_NAMES)
    axis.set_yticks([at + 0.5 for at in range(0, len(names), every)], names[::every], fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set_title("Share of each gradient's energy that centering removes", loc="left", fontweight="bold")
    axis.set_xlabel("steps taken")
    percent = optional("matplotlib.ticker").PercentFormatter(1)
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=4 + 2 * min(len(names), _MAX_NAMES), format=percent)
    bar.outline.set_visible(False)


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [_number(getattr(record.net, name)) for record in records]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
