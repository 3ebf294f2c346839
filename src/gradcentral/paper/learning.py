"""Training loss and test metric, with intervals over the seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.report import Series, draw_series, scale
from gradcentral.experiment.run_comparison import compare
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["learning"]


def learning(study: Study, runs: Path, *, progress: bool) -> Figure:
    """Figure 6 of the paper: a comparison of all arms, which shows its own progress.

    Finished runs are kept in the folder ``runs``.
    """
    comparison = compare(
        study.source,
        seeds=study.seeds,
        epochs=study.epochs,
        optimizers=[study.optimizer],
        device=study.device,
        out=runs,
        progress=progress,
    )
    numbers = ("train_loss", "test_loss", "test_metric", "share", "gradient_norm", "centered_norm", "drift")
    return Figure(
        f"{study.task.name}, {study.optimizer}: learning, mean and 95% interval of {study.runs}",
        lambda theme: _draw(comparison, study.optimizer, theme),
        ("arm", "seed", "epoch", *numbers),
        [
            (run.arm, run.seed, epoch["epoch"], *(epoch.get(number) for number in numbers))
            for run in comparison.all_runs
            for epoch in run.epochs
        ],
    )


def _draw(comparison: Comparison, optimizer: str, theme: Theme) -> Any:
    metric = f"test {comparison.metric}"
    with style(theme):
        figure = new_figure(9.8, 3.7)
        axes = figure.subplots(1, 2)
        shown = (Series("training loss", "train_loss", "log"), Series(metric, "test_metric", "late"))
        for axis, series in zip(axes, shown, strict=True):
            scale(axis, series, draw_series(axis, comparison, optimizer, series, theme))
            axis.set_ylabel(series.label)
            axis.set_title(series.label.capitalize(), loc="left", fontweight="bold")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(handles), frameon=False)
        return figure
