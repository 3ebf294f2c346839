"""Destinations of the records of `Monitor`: files, TensorBoard, loggers and functions."""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gradcentral.diagnostics.claims import Claim
from gradcentral.diagnostics.record import Record
from gradcentral.diagnostics.record_files import RecordFile
from gradcentral.extras import optional

__all__ = ["Writer", "writers_for"]


class Destination(Protocol):
    """Where records are written."""

    def start(self) -> Record | None:
        """Claim the destination; return the last record in it of an earlier run, if it is a file that has one."""

    def __call__(self, record: Record) -> None:
        """Write a record."""

    def close(self) -> None:
        """Let other monitors use the destination."""


class Writer:
    """Writes to a destination without ever stopping the training.

    The first exception becomes a warning. Later records are still written, if they can be.
    """

    def __init__(self, destination: Destination, where: str) -> None:
        self.where = where
        self._destination = destination
        self._warned = False
        self._missing = 0

    def start(self) -> Record | None:
        """Claim the destination; return the last record in it of an earlier run, if it is a file that has one.

        Raises:
            ValueError: another monitor has claimed it, or it has other contents.
        """
        try:
            return self._destination.start()
        except OSError as error:
            self._warn("could not be opened", error)
            return None

    def __call__(self, record: Record) -> None:
        """Write a record."""
        try:
            self._destination(record)
        except Exception as error:
            self._missing += 1
            self._warn(f"the record of step {record.step} was not written", error)
            return
        if self._missing:
            missing, self._missing = self._missing, 0
            warnings.warn(
                f"to: {self.where}: records are written again from step {record.step} on; the {missing} before it are "
                "missing there",
                stacklevel=2,
            )

    def close(self) -> None:
        """End the writing, and let other monitors use the destination."""
        try:
            self._destination.close()
        except Exception as error:
            self._warn("could not be closed", error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = traceback.format_exception_only(error)[-1].strip()
            warnings.warn(
                f"to: {self.where}: {what} ({reason}); training goes on, and so does writing as soon as it works",
                stacklevel=3,
            )


def writers_for(to: Any, name: str | None = None) -> list[Writer]:
    """Return the writers for the argument ``to`` of `Monitor`, whose documentation also lists the errors."""
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [writer for item in to for writer in writers_for(item, name)]
    if isinstance(to, (str, os.PathLike)):
        path = Path(to)
        is_file = path.suffix and not path.is_dir()
        return [Writer(RecordFile(path, name) if is_file else _Board(path, name), str(path))]
    where = getattr(to, "__qualname__", type(to).__qualname__)
    if (log := _logging_function(to)) is not None:
        return [Writer(_Logger(log, name, where), where)]
    if callable(to) and _accepts(to, None):
        return [Writer(_Function(to), where)]
    raise TypeError(
        "to must be a path (.jsonl, .csv, or a folder for TensorBoard), a SummaryWriter, a logger with log_metrics, a "
        f"run of Weights & Biases, a function, or a list of these, not {where}; for any other logger, give a function "
        "such as lambda record: print(record.scalars())"
    )


def _logging_function(to: Any) -> Callable[..., object] | None:
    """Return the function that takes a dictionary of scalars and ``step=``, if ``to`` is or has one."""
    if isinstance(to, type):
        return None
    if hasattr(to, "add_scalar"):
        return _SummaryWriterLog(to)
    methods = [getattr(to, name, None) for name in ("log_metrics", "log_dict", "log")]
    found = (method for method in methods if callable(method) and (_accepts(method, {}, step=0) or _hides(method)))
    return next(found, to if callable(to) and _accepts(to, {}, step=0) else None)


def _hides(method: Callable[..., object]) -> bool:
    """Return whether a decorator hides the parameters of a method, as that of accelerate's ``Accelerator.log`` does."""
    try:
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    except (TypeError, ValueError):  # as in `_accepts`
        return False
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _accepts(function: Callable[..., object], argument: object, **named: object) -> bool:
    """Return whether a function can be called with these arguments, and declares the named ones by name."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return not named
    try:
        signature.bind(argument, **named)
    except TypeError:
        return False
    return named.keys() <= signature.parameters.keys()


class _Function:
    """A function of a record, which may serve several monitors."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self._function = function

    def start(self) -> None:
        pass

    def __call__(self, record: Record) -> None:
        self._function(record)

    def close(self) -> None:
        pass


class _Logger:
    """A function of a dictionary of scalars and a step."""

    def __init__(self, log: Callable[..., object], name: str | None, where: str) -> None:
        self._log, self._name, self._where = log, name, where
        self._claim: Claim | None = None

    def start(self) -> None:
        self._claim = self._claim or Claim(self._log, self._name, self._where)

    def __call__(self, record: Record) -> None:
        self._log(record.scalars(), step=record.step)

    def close(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._claim = None


class _SummaryWriterLog:
    """The method ``log`` that a SummaryWriter lacks."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SummaryWriterLog) and self.writer is other.writer

    def __hash__(self) -> int:
        return id(self.writer)


class _Board:
    """A folder of TensorBoard, flushed after each record."""

    def __init__(self, folder: Path, name: str | None) -> None:
        self._create = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder, self._name = folder, name
        self._claim: Claim | None = None
        self._writer: Any = self._create(str(folder))

    def start(self) -> None:
        self._claim = self._claim or Claim(self._folder, self._name, self._folder)

    def __call__(self, record: Record) -> None:
        # After an exception, a SummaryWriter raises it forever, so the next record is written by another one.
        writer, self._writer = self._writer or self._create(str(self._folder)), None
        _SummaryWriterLog(writer)(record.scalars(), record.step)
        writer.flush()
        self._writer = writer

    def close(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._claim = None
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
