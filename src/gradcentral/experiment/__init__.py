"""Paired training runs with and without Gradient Centralization, statistics and a report."""

from __future__ import annotations

from gradcentral.experiment.comparison import Comparison, Row
from gradcentral.experiment.errors import ArmError, ExperimentError, ResultsError, RunError, TaskError
from gradcentral.experiment.loading import load_task
from gradcentral.experiment.run_comparison import compare
from gradcentral.experiment.statistics import Paired
from gradcentral.experiment.store import Run
from gradcentral.experiment.task import CustomTask, Task
from gradcentral.experiment.verdict import Verdict

__all__ = [
    "ArmError",
    "Comparison",
    "CustomTask",
    "ExperimentError",
    "Paired",
    "ResultsError",
    "Row",
    "Run",
    "RunError",
    "Task",
    "TaskError",
    "Verdict",
    "compare",
    "load_task",
]
