"""A finished run, and the results folder: one JSON line per run, appended durably."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradcentral.experiment.errors import ResultsError
from gradcentral.json_lines import append, drop_partial_line, read_lines

__all__ = ["Key", "Run", "Store"]

RESULTS, FINGERPRINT, LOCK = "results.jsonl", "task.json", ".lock"


class Key(NamedTuple):
    """Identifies a run within a comparison."""

    optimizer: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        optimizer, arm, seed: identify it.
        epochs: one mapping per epoch: ``train_loss`` (running mean over the epoch), ``test_loss``, ``test_metric``,
            ``drift`` (‖eᵀ(w − w⁰)‖ over all weight vectors) and ``data`` (hash of the order of the examples and of the
            first batch); and of its first and last step ``share`` (fraction of the raw gradient's energy that GC
            removes, or would remove), ``gradient_norm`` (‖g‖ over all parameters) and ``centered_norm`` (‖Φ(g)‖). A
            number that was not finite is None; runs of earlier versions lack some.
        train_metric: at the end, in eval mode, on as many training examples as there are test examples.
        diverged_at: the epoch, counted from 1, in which the loss or metric was no longer finite.
        seconds: duration.
        weights: hash of the initial weights.
        environment: versions and device.
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
        # JSON has no NaN, so a run in memory has none either: it equals the one read back.
        object.__setattr__(self, "epochs", _finite(self.epochs))
        object.__setattr__(self, "train_metric", _finite(self.train_metric))

    @property
    def key(self) -> Key:
        """Its optimizer, arm and seed."""
        return Key(self.optimizer, self.arm, self.seed)

    def final(self, name: str) -> float | None:
        """Return a number of the last epoch; None if the run diverged or does not have it."""
        if self.diverged_at is not None:
            return None
        value = self.epochs[-1].get(name)
        return None if value is None else float(value)

    def to_line(self) -> str:
        """Format the run as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Run:
        """Parse a line that `to_line` wrote."""
        return cls(**json.loads(line))


class Store:
    """A results folder: finished runs in ``results.jsonl``, and the fingerprint of their task in ``task.json``.

    Use it in a ``with`` block, which locks the folder against a second comparison, then call `begin`.

    Attributes:
        folder: its path.
        runs: the finished runs.
        fingerprint: of their task.

    Raises:
        ResultsError: the folder is in use, holds runs of another task, or has a line that cannot be parsed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Key, Run] = {}
        self.fingerprint: dict[str, str] = {}
        self._lock: Any = None

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise ResultsError(f"{self.folder}: cannot write there ({error.strerror}); give another --out") from error
        if not _try_lock(self._lock):
            self._lock.close()
            raise ResultsError(f"{self.folder}: another comparison is writing there; wait for it or give another --out")
        return self

    def __exit__(self, *_: object) -> None:
        # The file is not removed: a third process could then lock a new one while the second holds the old one.
        self._lock.close()

    def begin(self, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Read the finished runs after checking that they belong to the task."""
        if not resume:
            self._move_aside()
        path = self.folder / RESULTS
        if path.exists():
            drop_partial_line(path)
            try:
                self.runs = {run.key: run for run in read_lines(path, Run.from_line, "run")}
            except ValueError as error:
                raise ResultsError(f"{error}; delete the line, or start again with --no-resume") from error
        if self.runs:
            self.fingerprint = self._read_fingerprint()
        self.extend_fingerprint(fingerprint)

    def extend_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Add parts to the stored fingerprint.

        Raises:
            ResultsError: a part that is already stored differs.
        """
        changed = [
            f"{name} (was {self.fingerprint[name]}, is {now})"
            for name, now in fingerprint.items()
            if self.fingerprint.get(name, now) != now
        ]
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ResultsError(
                f"{self.folder}: the runs there belong to another task. Changed: {'; '.join(changed[:3])}{more}. "
                "Give another --out to keep both, or --no-resume to move them aside"
            )
        self.fingerprint |= fingerprint
        path = self.folder / FINGERPRINT
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.fingerprint, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(path)

    def add(self, run: Run) -> None:
        """Store a finished run; it is on disk when this returns."""
        append(self.folder / RESULTS, run.to_line() + "\n", sync=True)
        self.runs[run.key] = run

    def _read_fingerprint(self) -> dict[str, str]:
        path = self.folder / FINGERPRINT
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"{path}: cannot be read, so the existing runs cannot be matched to a task; "
                "give another --out, or --no-resume to move them aside"
            ) from error

    def _move_aside(self) -> None:
        old = [path for path in self.folder.iterdir() if path.is_file() and path.name != LOCK]
        if not old:
            return
        number = 1
        while (aside := self.folder / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in old:
            path.replace(aside / path.name)


def _finite(value: Any) -> Any:
    """Replace every number that is not finite by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _try_lock(file: Any) -> bool:
    """Lock a file until it is closed or the process ends; return False if another process holds the lock."""
    try:
        if os.name == "nt":
            msvcrt: Any = __import__("msvcrt")
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
