"""A finished run, and the results folder: one JSON line per run, appended durably."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout  # torch requires it too

from gradcentral.experiment.determinism import same
from gradcentral.experiment.errors import ResultsError
from gradcentral.json_lines import append, drop_partial_line, read_lines

__all__ = ["Key", "Run", "Store"]

RESULTS, FINGERPRINT, LOCK = "results.jsonl", "task.json", ".lock"


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
        """Parse a line of ``results.jsonl``."""
        return cls(**json.loads(line))


class Store:
    """A results folder: finished runs in ``results.jsonl``, and the fingerprint of their task in ``task.json``.

    Use it in a ``with`` block, which locks the folder against a second comparison, then call `begin`. A `ResultsError`
    is raised if the folder is in use, holds runs of another task, or has a line that cannot be parsed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Key, Run] = {}
        self.fingerprint: dict[str, str] = {}
        self._lock = FileLock(folder / LOCK, timeout=0)

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise ResultsError(
                f"{self.folder}: another comparison is using this folder; wait for it or give another --out"
            ) from None
        except OSError as error:
            raise ResultsError(f"{self.folder}: cannot be written ({error.strerror}); give another --out") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def begin(self, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Read the finished runs after checking that they belong to the task."""
        results, stored = self.folder / RESULTS, self.folder / FINGERPRINT
        if not resume:
            self._move_aside()
        if results.exists():
            drop_partial_line(results)
            try:
                self.runs = {run.key: run for run in read_lines(results, Run.from_line, "run")}
            except ValueError as error:
                raise ResultsError(f"{error}; delete the line, or start again with --no-resume") from error
        if self.runs:
            try:
                self.fingerprint = dict(json.loads(stored.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise ResultsError(
                    f"{stored}: cannot be read, so the existing runs cannot be matched to a task; "
                    "give another --out, or --no-resume to move them aside"
                ) from error
        self.extend_fingerprint(fingerprint)

    def extend_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Add parts to the stored fingerprint, after checking that no stored part differs."""
        stored = self.fingerprint
        changed = [
            f"{k} (was {stored[k]}, is {now})" for k, now in fingerprint.items() if not same(stored.get(k, now), now)
        ]
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ResultsError(
                f"{self.folder}: its runs belong to another task. Changed: {'; '.join(changed[:3])}{more}. "
                "Give another --out to keep both, or --no-resume to move them aside"
            )
        self.fingerprint |= fingerprint
        new = self.folder / f"{FINGERPRINT}.new"
        new.write_text(json.dumps(self.fingerprint, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.folder / FINGERPRINT)

    def add(self, run: Run) -> None:
        """Store a finished run; it is on disk when this returns."""
        append(self.folder / RESULTS, json.dumps(asdict(run), allow_nan=False) + "\n", sync=True)
        self.runs[run.key] = run

    def _move_aside(self) -> None:
        if old := [path for path in self.folder.iterdir() if path.is_file() and path.name != LOCK]:
            candidates = (self.folder / f"previous-{number}" for number in itertools.count(1))
            aside = next(path for path in candidates if not path.exists())
            aside.mkdir()
            for path in old:
                path.replace(aside / path.name)
