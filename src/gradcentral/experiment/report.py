"""Write a comparison's ``summary.csv``, its figures as PNG, and the self-contained ``report.html``."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from gradcentral.experiment.arms import NONE
from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.statistics import interval_of_mean
from gradcentral.experiment.store import REPORT, SUMMARY, Run
from gradcentral.extras import optional
from gradcentral.plotting import DARK, LIGHT, STYLES, Theme, new_figure, recolor, style, to_png, to_svg

__all__ = ["Series", "draw_series", "scale", "write_report"]


def write_report(comparison: Comparison) -> None:
    """Write the report and its files into the comparison's folder, replacing those of an earlier call."""
    folder, drawn = OutputFolder(comparison.out), _figures(comparison)
    folder.claim([SUMMARY, REPORT, *(f"{name}.png" for name in drawn)])
    folder.write(SUMMARY, comparison.to_csv())
    figures = {}
    for name, (title, draw) in drawn.items():
        figure = draw(LIGHT)
        light = to_svg(figure)
        folder.write(f"{name}.png", to_png(figure, f"{comparison.task}: {title}"))
        light64, dark64 = (base64.b64encode(svg).decode() for svg in (light, recolor(light, LIGHT, DARK)))
        figures[name] = {"title": title, "light": light64, "dark": dark64}
    jinja2 = optional("jinja2")
    loader = jinja2.PackageLoader("gradcentral.experiment", ".")
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = templates.get_template("report.html.jinja2").render(comparison=comparison, figures=figures)
    folder.write(REPORT, html)


def _figures(comparison: Comparison) -> dict[str, tuple[str, Callable[[Theme], Any]]]:
    """Return name -> (title, function that draws the figure), for the figures that have data."""
    metric = f"test {comparison.metric}"
    figures: dict[str, tuple[str, Callable[[Theme], Any]]] = {}
    figures["differences"] = ("Paired differences", partial(_differences, comparison))
    for name, title, series in (
        ("test_metric", metric.capitalize(), Series(metric, "test_metric", "late")),
        ("training_loss", "Training loss", Series("training loss", "train_loss", "log")),
        ("gradient_norm", "Gradient norm", Series("‖g‖, with GC ‖Φ(g)‖", "centered_norm", "log", "gradient_norm")),
        ("drift", "Drift of the weights' means", Series("drift ‖eᵀ(w − w⁰)‖", "drift")),
    ):
        if any(value is not None for run in comparison.all_runs for value in series.values(run)):
            figures[name] = (title, partial(_curves, comparison, series))
    if (probe := comparison.probe) is not None and probe.centered:
        figures["share"] = ("Where GC acts", probe.plot)
    return figures


class Series(NamedTuple):
    """A number recorded in every epoch, and the options of its plot."""

    label: str
    name: str
    scale: str = "all"
    """``"log"``, ``"all"`` (linear) or ``"late"`` (linear, cut to show the last two thirds)."""
    name_of_none: str = ""
    """The name for the arm without GC, if that differs."""

    def values(self, run: Run) -> list[float | None]:
        """Return one value per epoch; None if the run does not have it."""
        name = (self.name_of_none if run.arm == NONE else "") or self.name
        return [epoch.get(name) for epoch in run.epochs]


def _curves(comparison: Comparison, series: Series, theme: Theme) -> Any:
    """Draw a number by epoch: one panel per optimizer, one line per arm, with 95% intervals over the seeds."""
    panels = len(comparison.optimizers)
    columns, rows = min(panels, 3), math.ceil(panels / 3)
    with style(theme):
        figure = new_figure(1 + 4.4 * columns, 0.5 + 3 * rows)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        means: list[Any] = []
        for unused in axes.flat[panels:]:
            unused.set_axis_off()
        for axis, optimizer in zip(axes.flat, comparison.optimizers, strict=False):
            means += draw_series(axis, comparison, optimizer, series, theme)
            axis.set_title(optimizer, loc="left", fontweight="bold")
        for axis in axes[:, 0]:
            axis.set_ylabel(series.label)
        scale(axes[0][0], series, means)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
        return figure


def draw_series(axis: Any, comparison: Comparison, optimizer: str, series: Series, theme: Theme) -> list[Any]:
    """Draw one line per arm with its interval; return the means by epoch of each line, for `scale`."""
    drawn = []
    for arm in comparison.arms:
        if points := _by_epoch(comparison.runs(optimizer, arm), series):
            epochs, means, lows, highs = zip(*points, strict=True)
            axis.plot(epochs, means, STYLES[arm], color=theme.arms[arm], lw=1.8, label=arm, marker="o", ms=2.5)
            axis.fill_between(epochs, lows, highs, color=theme.arms[arm], alpha=0.16, lw=0)
            drawn.append(means)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)
    return drawn


def scale(axis: Any, series: Series, drawn: Sequence[Sequence[float]]) -> None:
    """Scale and cut the vertical axis so that the lines can be distinguished."""
    every = [mean for means in drawn for mean in means]
    if not every:
        return
    low, high = axis.get_ylim()
    if series.scale == "log" and min(every) > 0:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        # With two or three seeds, intervals can span ten orders of magnitude.
        axis.set_ylim(max(low, min(every) / 10), min(high, max(every) * 10))
    elif series.scale == "all" and min(every) >= 0:
        axis.set_ylim(-0.05 * max(every), min(high, 2 * max(every)))
    else:
        late = [mean for means in drawn for mean in means[len(means) // 3 :]]
        # The steep first epochs, or the wide intervals of few runs, would flatten the part to compare.
        reach = (max(late) - min(late)) or abs(late[0]) or 1.0
        axis.set_ylim(max(low, min(late) - 0.3 * reach), min(high, max(late) + 0.3 * reach))


def _differences(comparison: Comparison, theme: Theme) -> Any:
    """Draw paired differences arm − none of the final test metric: one dot per seed, the mean and its interval."""
    verdicts = comparison.verdicts
    with style(theme):
        figure = new_figure(9.8, 1.3 + 0.52 * len(verdicts))
        axis = figure.subplots()
        axis.axvline(0, color=theme.text, lw=1, zorder=1)
        for y, verdict in enumerate(verdicts):
            evidence, color = verdict.evidence, theme.arms[verdict.arm]
            # The dots of a row are spread slightly, so that equal ones can be distinguished.
            heights = optional("numpy").linspace(y + 0.1, y + 0.24, len(evidence.differences))
            axis.plot(evidence.differences, heights, "o", color=color, ms=4, alpha=0.55, mew=0)
            if evidence.interval is not None:
                axis.plot(evidence.interval, [y - 0.14] * 2, color=color, lw=2.6, solid_capstyle="butt")
            if evidence.mean is not None:
                axis.plot(evidence.mean, y - 0.14, "D", color=color, ms=6.5, mec=theme.background, mew=1)
            else:
                axis.text(0, y, "  no pair finished", va="center", color=theme.text)
        axis.set_yticks(range(len(verdicts)), [f"{v.optimizer}, {v.arm}" for v in verdicts], fontsize=10)
        axis.set_ylim(len(verdicts) - 0.55, -0.5)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        better = "→ better" if comparison.higher_is_better else "← better"
        axis.set_xlabel(f"difference in test {comparison.metric}, arm − none    {better}")
        axis.margins(x=0.12)
        return figure


def _by_epoch(runs: Sequence[Run], series: Series) -> list[tuple[float, ...]]:
    """Return (epoch, mean, low, high) over the runs that did not diverge; on a log axis, all three are geometric."""
    columns = itertools.zip_longest(*(series.values(run) for run in runs if run.diverged_at is None))
    points: list[tuple[float, ...]] = []
    for epoch, column in enumerate(columns, start=1):
        if values := [value for value in column if value is not None]:
            # Losses vary by factors, so an interval around the arithmetic mean could extend below zero.
            log = series.scale == "log" and min(values) > 0
            numbers = interval_of_mean([math.log(value) if log else value for value in values])
            points.append((epoch, *(math.exp(min(number, 700)) if log else number for number in numbers)))
    return points
