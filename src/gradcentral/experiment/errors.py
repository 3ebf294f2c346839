"""The errors of an experiment, and exceptions of a task's code on one line. Every message includes a remedy."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["ArmError", "ExperimentError", "ResultsError", "RunError", "TaskError", "line_of", "one_line"]


class ExperimentError(Exception):
    """An experiment cannot continue; the command line prints the message and exits with code 2."""


class TaskError(ExperimentError, ValueError):
    """The task, or an option of the comparison, is not usable."""


class ArmError(ExperimentError):
    """A run did not train as its arm requires, so comparing it would be meaningless."""


class RunError(ExperimentError):
    """The task's own code raised an exception during a run."""


class ResultsError(ExperimentError):
    """The output folder holds results that cannot be continued."""


def one_line(error: BaseException) -> str:
    """Format an exception on one line, without the type's name for an `ExperimentError`."""
    message = " ".join(str(error).split())
    if isinstance(error, ExperimentError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def line_of(error: BaseException, file: Path | None = None) -> str:
    """Locate the line that failed: the last one in the user's file, else the last one outside torch and gradcentral."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return str(file)
    own = [frame for frame in frames if file is not None and Path(frame.filename) == file]
    foreign = [frame for frame in frames if not {"torch", "gradcentral"} & set(Path(frame.filename).parts)]
    frame = (own or foreign or list(frames))[-1]
    return f"{frame.filename}, line {frame.lineno}"
