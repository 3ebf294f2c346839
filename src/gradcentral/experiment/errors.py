"""The errors of an experiment, whose messages include a remedy, and one-line forms of exceptions in a task's code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "ArmError",
    "ExperimentError",
    "ResultsError",
    "RunError",
    "TaskError",
    "exits_named",
    "line_of",
    "naming",
    "one_line",
]


class ExperimentError(Exception):
    """An experiment cannot continue; the command line prints the message and exits with code 2."""

    trace = ""  # the traceback of the exception in a run, if the error reports one


class TaskError(ExperimentError, ValueError):
    """The task, or an option of the comparison, is not usable."""


class ArmError(ExperimentError):
    """A run did not train as its arm requires, so comparing it would be meaningless."""


class RunError(ExperimentError):
    """The task's own code raised an exception during a run."""


class ResultsError(ExperimentError):
    """The output folder holds files that cannot be continued or must not be replaced, or it cannot be written."""

    comparison: Any = None  # the `Comparison`, if all runs finished and only its report could not be written


def one_line(error: BaseException) -> str:
    """Format an exception on one line, without the type's name for an `ExperimentError`."""
    try:
        message = " ".join(str(error).split())
    except Exception as failure:
        message = f"its message cannot be formatted, because __str__ raises {type(failure).__name__}"
    return message if isinstance(error, ExperimentError) else f"{type(error).__name__}: {message}".removesuffix(": ")


def line_of(error: BaseException, file: Path | None) -> str:
    """Locate the line that failed: the last one in the user's file, or the last one outside torch and gradcentral."""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if Path(frame.filename) == file]
    foreign = [frame for frame in frames if not {"torch", "gradcentral"} & set(Path(frame.filename).parts)]
    frame = (own or foreign or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


@contextmanager
def naming(part: str, file: Path | None = None) -> Iterator[None]:
    """Name the part of the task in the message of any exception that its code raises inside the block."""
    try:
        yield
    except ExperimentError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit in a task's code must not end this program
        raise TaskError(f"{part}: {one_line(error)} ({line_of(error, file)})") from error


@contextmanager
def exits_named() -> Iterator[None]:
    """Turn a ``sys.exit`` in a task's code, which must not end this program, into a `TaskError`."""
    try:
        yield
    except SystemExit as error:
        raise TaskError(f"the task's code ends the program: {one_line(error)} ({line_of(error, None)})") from error
