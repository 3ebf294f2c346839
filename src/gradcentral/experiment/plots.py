"""The figures of a report, in light and in dark."""

from __future__ import annotations

import math
from typing import Any

from gradcentral.analysis.theme import STYLES, Theme, new_figure, style
from gradcentral.experiment.results import Comparison
from gradcentral.experiment.statistics import interval_of_mean

__all__ = ["curves", "differences"]


def curves(comparison: Comparison, name: str, label: str, theme: Theme) -> Any:
    """One panel an optimizer: a number by epoch, mean and 95% interval over the seeds, a line an arm.

    Args:
        comparison: the runs.
        name: ``train_loss`` or ``test_metric``.
        label: of the vertical axis.
        theme: colors.
    """
    columns = min(len(comparison.optimizers), 3)
    rows = math.ceil(len(comparison.optimizers) / columns)
    with style(theme):
        figure = new_figure(1 + 4.4 * columns, 0.5 + 3 * rows)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        late: list[float] = []
        for unused in axes.flat[len(comparison.optimizers) :]:
            unused.set_axis_off()
        for axis, optimizer in zip(axes.flat, comparison.optimizers, strict=False):
            for arm in comparison.arms:
                points = _by_epoch(comparison, optimizer, arm, name)
                if not points:
                    continue
                epochs, means, lows, highs = zip(*points, strict=True)
                late += means[len(means) // 3 :]
                color = theme.arms[arm]
                axis.plot(epochs, means, STYLES[arm], color=color, lw=1.8, label=arm, marker="o", ms=2.5)
                axis.fill_between(epochs, lows, highs, color=color, alpha=0.16, lw=0)
            axis.set_title(optimizer, loc="left", fontweight="bold")
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.margins(x=0.02)
        for axis in axes[:, 0]:
            axis.set_ylabel(label)
        if name == "train_loss" and late and min(late) > 0:
            axes[0][0].set_yscale("log")
        elif late:
            _show_late_epochs(axes[0][0], late)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper right", ncols=len(handles), frameon=False)
        return figure


def differences(comparison: Comparison, theme: Theme) -> Any:
    """Paired differences arm − none of the final test metric: a dot a seed, the mean and its interval."""
    rows = [(v.optimizer, v.arm, v.evidence) for v in comparison.verdicts]
    with style(theme):
        figure = new_figure(9.8, 1.3 + 0.52 * len(rows))
        axis = figure.subplots()
        axis.axvline(0, color=theme.text, lw=1, zorder=1)
        for at, (_, arm, evidence) in enumerate(rows):
            y, color, n = -at, theme.arms[arm], len(evidence.differences)
            offsets = [0.26 * (i / (n - 1) - 0.5) if n > 1 else 0.0 for i in range(n)]
            axis.plot(
                evidence.differences, [y - 0.17 + o / 2 for o in offsets], "o", color=color, ms=4, alpha=0.55, mew=0
            )
            if evidence.interval is not None:
                axis.plot(evidence.interval, [y + 0.14] * 2, color=color, lw=2.6, solid_capstyle="butt")
            if evidence.mean is not None:
                axis.plot(evidence.mean, y + 0.14, "D", color=color, ms=6.5, mec=theme.background, mew=1)
            else:
                axis.text(0, y, "  no pair finished", va="center", color=theme.text)
        axis.set_yticks(
            [-at for at in range(len(rows))], [f"{optimizer}, {arm}" for optimizer, arm, _ in rows], fontsize=10
        )
        axis.set_ylim(0.55 - len(rows), 0.5)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        better = "→ better" if comparison.higher_is_better else "← better"
        axis.set_xlabel(f"difference in test {comparison.metric}, arm − none    {better}")
        low, high = axis.get_xlim()
        reach = max(abs(low), abs(high))
        if low > 0 or high < 0 or reach > 8 * min(abs(low), abs(high)):
            axis.set_xlim(min(low, -0.12 * reach), max(high, 0.12 * reach))
        return figure


def _by_epoch(comparison: Comparison, optimizer: str, arm: str, name: str) -> list[tuple[int, float, float, float]]:
    """(epoch, mean, low, high) over the runs that did not diverge; on a log axis all three are geometric."""
    runs = [run for run in comparison.runs(optimizer, arm) if run.diverged_at is None]
    points = []
    for epoch in range(max((len(run.epochs) for run in runs), default=0)):
        values = [
            float(v) for run in runs if epoch < len(run.epochs) and (v := run.epochs[epoch].get(name)) is not None
        ]
        if not values:
            continue
        if name == "train_loss" and min(values) > 0:
            # Losses spread by factors; an interval around the plain mean could reach below zero.
            logs = interval_of_mean([math.log(value) for value in values])
            mean, low, high = (math.exp(min(x, 700)) for x in logs)
        else:
            mean, low, high = interval_of_mean(values)
        points.append((epoch + 1, mean, low, high))
    return points


def _show_late_epochs(axis: Any, means: list[float]) -> None:
    """The first epochs' steep part, or the wide interval of few runs, would flatten what is to be compared."""
    reach = (max(means) - min(means)) or abs(means[0]) or 1.0
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, min(means) - 0.3 * reach), min(high, max(means) + 0.3 * reach))
