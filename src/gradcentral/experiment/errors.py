"""What can go wrong in an experiment. Every message is one line that says what to do."""

from __future__ import annotations

__all__ = ["ArmError", "ExperimentError", "ResultsError", "RunError", "TaskError"]


class ExperimentError(Exception):
    """An experiment can't go on; the command line prints the message and exits with code 2."""


class TaskError(ExperimentError, ValueError):
    """The task, or an option of the comparison, is not usable."""


class ArmError(ExperimentError):
    """A run did not do what its arm says, so that comparing it would mean nothing."""


class RunError(ExperimentError):
    """A run ended in an exception of the task's own code."""


class ResultsError(ExperimentError):
    """The output folder holds results that can't be continued."""
