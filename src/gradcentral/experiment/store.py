"""What a run leaves behind, and the folder that keeps it: one line a finished run, written to last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from gradcentral.experiment.errors import ResultsError

__all__ = ["Key", "Run", "Store"]

RESULTS, FINGERPRINT, LOCK = "results.jsonl", "task.json", ".lock"


class Key(NamedTuple):
    """Names one run."""

    optimizer: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        optimizer, arm, seed: which one.
        epochs: per epoch ``train_loss`` (running mean over the epoch), ``test_loss``, ``test_metric``; at its first and
            last step ``share`` (of the raw gradient's energy that GC removes, or would), ``gradient_norm`` (‖g‖, all
            parameters together) and ``centered_norm`` (‖Φ(g)‖); at its end ``drift`` (‖eᵀ(w − w⁰)‖ over all weight
            vectors); and ``data`` (hash of the order of the examples and of the first batch). A number that was not
            finite is None; runs of earlier versions lack some.
        train_metric: at the end, in eval mode, on as many training examples as there are test examples.
        diverged_at: the epoch, counted from 1, in which the loss or metric was no longer finite.
        seconds: what it took.
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
        # JSON knows no NaN; a run in memory equals the one read back.
        object.__setattr__(self, "epochs", _finite(self.epochs))
        object.__setattr__(self, "train_metric", _finite(self.train_metric))

    @property
    def key(self) -> Key:
        """Its name."""
        return Key(self.optimizer, self.arm, self.seed)

    def final(self, name: str) -> float | None:
        """A number of the last epoch; None where the run diverged or does not have it."""
        if self.diverged_at is not None:
            return None
        value = self.epochs[-1].get(name)
        return None if value is None else float(value)

    def to_line(self) -> str:
        """The run as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Run:
        """The run of a line that `to_line` wrote."""
        return cls(**json.loads(line))


class Store:
    """An output folder: finished runs in ``results.jsonl`` and, in ``task.json``, what they were runs of.

    Use it in a ``with`` block, which keeps a second comparison out of the folder.

    Raises:
        ResultsError: another comparison is writing there, the runs there are of another task, or a line of them
            can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Key, Run] = {}
        self._lock: Any = None

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise ResultsError(f"{self.folder}: can't write there ({error.strerror}); give another --out") from error
        if not _try_lock(self._lock):
            self._lock.close()
            raise ResultsError(f"{self.folder}: another comparison is writing there; wait for it or give another --out")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let a third process lock a new one beside the second.
        self._lock.close()

    def begin(self, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Read the finished runs, once it is sure that they are of the same task."""
        if not resume:
            self._move_aside()
        self.runs = {run.key: run for run in self._read()}
        self._write_fingerprint(self._agreed(fingerprint) if self.runs else dict(fingerprint))

    def add(self, run: Run) -> None:
        """Keep a finished run: on disk before this returns."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(run.to_line() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs[run.key] = run

    def _read(self) -> list[Run]:
        path = self.folder / RESULTS
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            # Killed while writing: what follows the last newline is a torn line.
            with path.open("r+b") as file:
                file.truncate(len(whole))
        runs = []
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
            try:
                runs.append(Run.from_line(line))
            except (ValueError, TypeError) as error:
                raise ResultsError(
                    f"{path}, line {number}: is not a run ({error}); delete the line, or start anew with --no-resume"
                ) from error
        return runs

    def _agreed(self, fingerprint: Mapping[str, str]) -> dict[str, str]:
        """Both fingerprints together, if what is in both is the same."""
        path = self.folder / FINGERPRINT
        try:
            before: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"{path}: can't be read, so that nobody knows what the runs there are of; "
                "give another --out, or --no-resume to move them aside"
            ) from error
        changed = [
            f"{name} (was {before[name]}, is {now})"
            for name, now in fingerprint.items()
            if before.get(name, now) != now
        ]
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ResultsError(
                f"{self.folder}: the runs there are of another task. Changed: {'; '.join(changed[:3])}{more}. "
                "Give another --out to keep both, or --no-resume to move them aside"
            )
        return {**before, **fingerprint}

    def _write_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        path = self.folder / FINGERPRINT
        new = path.with_suffix(".new")
        new.write_text(json.dumps(fingerprint, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(path)

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
    """The value with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _try_lock(file: Any) -> bool:
    """Lock a file until it is closed or the process ends, however it ends; False where someone else has."""
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
