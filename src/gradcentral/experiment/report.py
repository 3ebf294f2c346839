"""Write a comparison's ``summary.csv``, its figures as PNG, and the self-contained ``report.html``."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.plots import Series, curves, differences
from gradcentral.extras import optional
from gradcentral.plotting import DARK, LIGHT, Theme, recolor, to_png, to_svg

__all__ = ["write_report"]


def write_report(comparison: Comparison) -> None:
    """Write the report and its files into the comparison's folder, replacing those of an earlier call."""
    comparison.out.joinpath("summary.csv").write_text(comparison.to_csv(), encoding="utf-8")
    figures = {}
    for name, (title, draw) in _figures(comparison).items():
        figure = draw(LIGHT)
        light = to_svg(figure)
        comparison.out.joinpath(f"{name}.png").write_bytes(to_png(figure, f"{comparison.task}: {title}"))
        light64, dark64 = (base64.b64encode(svg).decode() for svg in (light, recolor(light, LIGHT, DARK)))
        figures[name] = {"title": title, "light": light64, "dark": dark64}
    environment = optional("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("gradcentral.experiment").joinpath("report.html.jinja2").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        comparison=comparison,
        figures=figures,
        environments=_environments(comparison),
        seconds=sum(run.seconds for run in comparison.all_runs),
        diverged=[run for run in comparison.all_runs if run.diverged_at is not None],
    )
    comparison.report.write_text(html, encoding="utf-8")


def _figures(comparison: Comparison) -> dict[str, tuple[str, Callable[[Theme], Any]]]:
    """Return name -> (title, function that draws the figure), for the figures that have data."""
    metric = f"test {comparison.metric}"
    figures: dict[str, tuple[str, Callable[[Theme], Any]]] = {
        "differences": ("Paired differences", partial(differences, comparison))
    }
    for name, title, series in (
        ("test_metric", metric.capitalize(), Series(metric, "test_metric", "late")),
        ("training_loss", "Training loss", Series("training loss", "train_loss", "log")),
        ("gradient_norm", "Gradient norm", Series("‖g‖, with GC ‖Φ(g)‖", "centered_norm", "log", "gradient_norm")),
        ("drift", "Drift of the weights' means", Series("drift ‖eᵀ(w − w⁰)‖", "drift")),
    ):
        if any(value is not None for run in comparison.all_runs for value in series.values(run)):
            figures[name] = (title, partial(curves, comparison, series))
    if (probe := comparison.probe) is not None and probe.centered:
        figures["share"] = ("Where GC acts", probe.plot)
    return figures


def _environments(comparison: Comparison) -> dict[str, str]:
    """Return the versions and the device; several of each if the runs were made in different environments."""
    found: dict[str, dict[str, None]] = {}  # dictionaries as ordered sets
    for run in comparison.all_runs:
        for name, value in run.environment.items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}
