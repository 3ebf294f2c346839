"""A finished run, and the results folder: one JSON line per run, appended durably."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout  # torch requires it too

from gradcentral.experiment.determinism import same
from gradcentral.experiment.errors import ResultsError
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.json_lines import append, finish_last_line, read_lines

__all__ = ["ERROR", "PROBE", "REPORT", "RESULTS", "SUMMARY", "Key", "Run", "Store"]

RESULTS, FINGERPRINT, LOCK = "results.jsonl", "task.json", ".gradcentral.lock"
PROBE, ERROR, SUMMARY, REPORT = "probe.json", "error.txt", "summary.csv", "report.html"
FIGURES = ("differences", "test_metric", "training_loss", "gradient_norm", "drift", "share")
FILES = (RESULTS, FINGERPRINT, PROBE, ERROR, SUMMARY, REPORT, *(f"{name}.png" for name in FIGURES))
"""The names of all files that a comparison may write, its results first."""


class Key(NamedTuple):
    """Identification of a run within a comparison."""

    optimizer: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        optimizer, arm, seed: identification of the run.
        epochs: one mapping per epoch: ``train_loss`` (running mean over the epoch), ``test_loss``, ``test_metric``,
            ``drift`` (‖eᵀ(w − w⁰)‖ over all weight vectors) and ``data`` (hash of the order of the examples and of the
            first batch); and, for its first and last step, ``share`` (fraction of the raw gradient's energy that GC
            removes, or would remove), ``gradient_norm`` (‖g‖ over all parameters) and ``centered_norm`` (‖Φ(g)‖). A
            number that was not finite is None; runs of earlier versions lack some numbers.
        train_metric: final metric in eval mode, on as many training examples as there are test examples.
        diverged_at: the epoch, counted from 1, in which the loss or metric was no longer finite.
        seconds, weights, environment: duration, hash of the initial weights, versions and device.
    """

    optimizer: str
    arm: str
    seed: int
    epochs: list[dict[str, Any]]
    train_metric: float | None
    diverged_at: int | None
    seconds: float
    weights: str | None
    environment: dict[str, str]

    def __post_init__(self) -> None:
        # JSON has no NaN, so a run in memory has none either and equals the run that is read back.
        for name in ("epochs", "train_metric"):
            value = json.loads(json.dumps(getattr(self, name)), parse_constant=lambda constant: None)
            object.__setattr__(self, name, value)

    @property
    def key(self) -> Key:
        """The run's optimizer, arm and seed."""
        return Key(self.optimizer, self.arm, self.seed)

    def final(self, name: str) -> float | None:
        """Return a number of the last epoch; None if the run diverged or does not have it."""
        last: dict[str, float | None] = self.epochs[-1] if self.diverged_at is None else {}
        return last.get(name)

    @classmethod
    def from_line(cls, line: str) -> Run:
        """Parse a line of ``results.jsonl``; a ValueError or TypeError names what is wrong with it."""
        run = cls(**json.loads(line))
        run._check()
        return run

    def _check(self) -> None:
        """Raise a ValueError if a value is of the wrong type, as in a line that was edited by hand."""
        texts, mappings = (self.optimizer, self.arm, *self.environment.values()), self.epochs
        valid = {
            "optimizer, arm and environment": all(isinstance(text, str) for text in texts),
            "seed": type(self.seed) is int,
            "seconds": _is_number(self.seconds),
            "train_metric": self.train_metric is None or _is_number(self.train_metric),
            "weights": self.weights is None or isinstance(self.weights, str),
            "epochs": bool(mappings) and all(isinstance(epoch, dict) and _is_epoch(epoch) for epoch in mappings),
            "diverged_at": self.diverged_at is None or type(self.diverged_at) is int,
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ValueError(f"{name}: invalid value")
        if self.diverged_at is None and self.epochs[-1]["train_loss"] is None:
            raise ValueError("epochs: the last one has no loss, but the run did not diverge")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_epoch(epoch: dict[str, Any]) -> bool:
    """Return whether an epoch has the required numbers, and no values but numbers, None and the hash of its data."""
    values = (value for name, value in epoch.items() if name != "data")
    return (
        {"epoch", "train_loss", "test_metric"} <= epoch.keys()
        and (epoch.get("data") is None or isinstance(epoch["data"], str) or _is_number(epoch["data"]))
        and all(value is None or _is_number(value) for value in values)
    )


class Store:
    """A results folder: finished runs in ``results.jsonl``, and the fingerprint of their task in ``task.json``.

    Use it in a ``with`` block, which locks the folder against a second comparison, then call `begin`. A `ResultsError`
    is raised if the folder is in use, holds runs of another task or somebody else's files, cannot be written, or has a
    line that cannot be parsed.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = OutputFolder(path)
        self.runs: dict[Key, Run] = {}
        self.fingerprint: dict[str, str] = {}
        self._lock = FileLock(self.folder.path / LOCK, timeout=0)

    def __enter__(self) -> Store:
        path = self.folder.path
        self.folder.check(FILES)
        with self.folder.writing():
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise ResultsError(
                    f"{path}: another comparison is using this folder; wait for it or give another --out"
                ) from None
            except NotImplementedError as error:
                raise ResultsError(f"{path}: the file system does not support locks; give another --out") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def begin(self, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Read the finished runs after checking that they belong to the task."""
        self.folder.check(FILES)  # again, because another comparison may have written before the lock was acquired
        if not resume:
            self.folder.move_aside(FILES)
        if os.path.lexists(self.folder.path / RESULTS):
            self._read_runs()
        if self.runs:
            self.fingerprint = self._read_fingerprint()
        stored = self.fingerprint
        changed = [
            f"{k} (was {stored[k]}, is {now})" for k, now in fingerprint.items() if not same(stored.get(k, now), now)
        ]
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ResultsError(
                f"{self.folder.path}: its runs belong to another task. Changed: {'; '.join(changed[:3])}{more}. "
                "Give another --out to keep both, or --no-resume to move them aside"
            )
        self.fingerprint |= fingerprint
        self.folder.claim([RESULTS, FINGERPRINT])
        self.folder.write(FINGERPRINT, json.dumps(self.fingerprint, indent=2, ensure_ascii=False) + "\n")

    def add(self, run: Run) -> None:
        """Store a finished run; it is on disk when this returns."""
        with self.folder.writing():
            append(self.folder.path / RESULTS, json.dumps(asdict(run), allow_nan=False) + "\n", sync=True)
        self.runs[run.key] = run

    def _read_runs(self) -> None:
        path = self.folder.path / RESULTS
        try:
            runs = read_lines(path, Run.from_line, "run")
            if (last := finish_last_line(path, Run.from_line, '{"optimizer": ')) is not None:
                runs.append(last)
            self.runs = {run.key: run for run in runs}
        except ValueError as error:
            raise ResultsError(f"{error}; delete the line, or start again with --no-resume") from error
        except OSError as error:
            raise ResultsError(
                f"{path}: cannot be read ({error.strerror}); give another --out, or --no-resume to move it aside"
            ) from error

    def _read_fingerprint(self) -> dict[str, str]:
        path = self.folder.path / FINGERPRINT
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or not all(isinstance(part, str) for part in stored.values()):
                raise ValueError("not a fingerprint")
        except (OSError, ValueError, RecursionError) as error:
            raise ResultsError(
                f"{path}: cannot be read, so the existing runs cannot be matched to a task; "
                "give another --out, or --no-resume to move them aside"
            ) from error
        return stored
