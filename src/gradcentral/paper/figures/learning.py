"""Training loss and test metric by epoch, with intervals over the seeds."""

from __future__ import annotations

from typing import Any

from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.plots import Series, draw_series, scale
from gradcentral.experiment.run_comparison import compare
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["learning_figure"]


def learning_figure(study: Study) -> Figure:
    """Learning curves of all arms, as Figures 5 to 7 of the paper show for its data sets.

    The runs are those of a comparison, which shows its own progress and keeps finished runs in ``study.runs``.
    """
    comparison = compare(
        study.source,
        seeds=study.seeds,
        epochs=study.epochs,
        optimizers=[study.optimizer],
        device=study.device,
        out=study.runs,
        progress=study.progress,
    )
    numbers = ("train_loss", "test_loss", "test_metric", "share", "gradient_norm", "centered_norm", "drift")
    return Figure(
        f"{study.task.name}, {study.optimizer}: learning curves, mean and 95% interval of {study.seed_label}",
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
