"""The share of each layer's gradient that GC removes before training."""

from __future__ import annotations

from gradcentral.experiment.probing import probe_task
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study

__all__ = ["shares_figure"]


def shares_figure(study: Study) -> Figure:
    """The plot of `gradcentral.probe` for the task's initial model."""
    (report,) = study.track((probe_task(study.task, seed=seed, device=study.device) for seed in (study.seed,)), 1)
    columns = ("name", "kind", "share", "spread", "finding")
    return Figure(
        f"{study.task.name}: where GC acts before training",
        report.plot,
        columns,
        [[getattr(layer, column) for column in columns] for layer in report.layers],
    )
