"""Writes ``summary.csv``, the figures as PNG and the self-contained ``report.html`` of a comparison."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

from gradcentral.experiment.arms import NONE
from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.plots import Series, curves, differences
from gradcentral.extras import optional
from gradcentral.plotting import DARK, LIGHT, Theme, recolor, to_png, to_svg

__all__ = ["write_report"]


def write_report(comparison: Comparison) -> None:
    """Write everything a person reads into the comparison's folder, over what an earlier call wrote."""
    comparison.out.joinpath("summary.csv").write_text(comparison.to_csv(), encoding="utf-8")
    figures = {}
    for name, (title, draw) in _figures(comparison).items():
        figure = draw(LIGHT)
        light = to_svg(figure)
        comparison.out.joinpath(f"{name}.png").write_bytes(to_png(figure, f"{comparison.task}: {title}"))
        schemes = {"light": light, "dark": recolor(light, LIGHT, DARK)}
        figures[name] = {"title": title} | {key: base64.b64encode(svg).decode() for key, svg in schemes.items()}
    environment = optional("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("gradcentral.experiment").joinpath("report.html.jinja2").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        comparison=comparison,
        figures=figures,
        none=NONE,
        columns=comparison.columns(),
        environments=_environments(comparison),
        seconds=sum(run.seconds for run in comparison.records),
        diverged=[run for run in comparison.records if run.diverged_at is not None],
    )
    comparison.report.write_text(html, encoding="utf-8")


def _figures(comparison: Comparison) -> dict[str, tuple[str, Callable[[Theme], Any]]]:
    """Name -> (title, how to draw it)."""
    metric = f"test {comparison.metric}"
    figures: dict[str, tuple[str, Callable[[Theme], Any]]] = {
        "differences": ("Paired differences", lambda theme: differences(comparison, theme))
    }
    for name, (title, series) in {
        "test_metric": (metric.capitalize(), Series(metric, "test_metric", "late")),
        "training_loss": ("Training loss", Series("training loss", "train_loss", "log")),
        "gradient_norm": ("Gradient norm", Series("‖g‖, with GC ‖Φ(g)‖", "centered_norm", "log", "gradient_norm")),
        "drift": ("Drift of the weights' means", Series("drift ‖eᵀ(w − w⁰)‖", "drift")),
    }.items():
        if any(value is not None for run in comparison.records for value in series.values(run)):
            figures[name] = (title, functools.partial(curves, comparison, series))
    if comparison.probe is not None and comparison.probe.centered:
        figures["share"] = ("Where GC acts", comparison.probe.plot)
    return figures


def _environments(comparison: Comparison) -> dict[str, str]:
    """Versions and device; several where runs of different days were made by different ones."""
    names = dict.fromkeys(name for run in comparison.records for name in run.environment)
    return {
        name: ", ".join(dict.fromkeys(run.environment[name] for run in comparison.records if name in run.environment))
        for name in names
    }
