"""The summary of a comparison in numbers: one row per optimizer and arm, and how to format its cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradcentral.experiment.statistics import epochs_to_reach, mean_std
from gradcentral.experiment.store import Run
from gradcentral.experiment.verdict import Verdict

__all__ = ["Row", "columns", "spread", "to_csv"]

NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One arm under one optimizer; diverged runs count in ``runs`` and ``diverged`` only.

    Attributes:
        optimizer, arm: identify it.
        runs: number of runs.
        diverged: how many of them diverged.
        test_metric: final value, one per run.
        train_loss: running mean over the last epoch.
        epochs_to_baseline: the first epoch whose training loss is at most the final one of the baseline's run of the
            same seed; None if there is none.
        gap: by how much the metric is better on training examples than on test examples, both in eval mode.
        share: fraction of the raw gradient's energy that GC removes or would remove, mean over a run's checked steps.
        seconds: duration of each run.
    """

    optimizer: str
    arm: str
    runs: int
    diverged: int
    test_metric: list[float]
    train_loss: list[float]
    epochs_to_baseline: list[int | None]
    gap: list[float]
    share: list[float]
    seconds: list[float]

    @classmethod
    def of(cls, runs: Sequence[Run], baseline: Sequence[Run], *, higher_is_better: bool) -> Row:
        """Summarize the runs of one arm.

        Args:
            runs: of one optimizer and arm, one per seed.
            baseline: those without GC, of the same seeds.
            higher_is_better: whether a larger metric is better.
        """
        finished = [(run, other) for run, other in zip(runs, baseline, strict=True) if run.diverged_at is None]
        sign = 1 if higher_is_better else -1
        shares = [_present(epoch.get("share") for epoch in run.epochs) for run, _ in finished]
        return cls(
            runs[0].optimizer,
            runs[0].arm,
            runs=len(runs),
            diverged=len(runs) - len(finished),
            test_metric=_present(run.final("test_metric") for run, _ in finished),
            train_loss=_present(run.final("train_loss") for run, _ in finished),
            epochs_to_baseline=[
                epochs_to_reach([epoch["train_loss"] for epoch in run.epochs], target)
                for run, other in finished
                if (target := other.final("train_loss")) is not None
            ],
            gap=[
                sign * (run.train_metric - (run.final("test_metric") or 0.0))
                for run, _ in finished
                if run.train_metric is not None
            ],
            share=[sum(values) / len(values) for values in shares if values],
            seconds=[run.seconds for run in runs],
        )


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "test {metric}": lambda row: spread(row.test_metric),
    "final training loss": lambda row: spread(row.train_loss),
    "epochs to none's final loss": lambda row: _epochs(row.epochs_to_baseline),
    "generalization gap": lambda row: spread(row.gap),
    "share removed": lambda row: f"{mean_std(row.share)[0]:.0%}" if row.share else NOTHING,
}


def columns(rows: Sequence[Row], metric: str) -> dict[str, Callable[[Row], str]]:
    """Return the titles of the table's columns with their formatters, leaving out columns without any number."""
    return {
        title.format(metric=metric): cell
        for title, cell in _COLUMNS.items()
        if any(cell(row) != NOTHING for row in rows)
    }


def to_csv(rows: Sequence[Row], verdicts: Iterable[Verdict]) -> str:
    """Format one line per row with full precision; cells without a number are empty."""
    file = io.StringIO()
    numbers = ("test_metric", "train_loss", "epochs_to_baseline", "gap", "share", "seconds")
    header = ["optimizer", "arm", "runs", "diverged"]
    header += [f"{name}_{what}" for name in numbers for what in ("mean", "std")]
    header += ["never_reached_baseline", "difference", "low", "high", "p_corrected", "outcome"]
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    by_arm = {(verdict.optimizer, verdict.arm): verdict for verdict in verdicts}
    for row in rows:
        cells: dict[str, Any] = {name: getattr(row, name) for name in header[:4]}
        for name in numbers:
            values = _present(getattr(row, name))
            cells[f"{name}_mean"], cells[f"{name}_std"] = mean_std(values) if values else (None, None)
        cells["never_reached_baseline"] = row.epochs_to_baseline.count(None)
        if (verdict := by_arm.get((row.optimizer, row.arm))) is not None:
            evidence = verdict.evidence
            cells["low"], cells["high"] = evidence.interval or (None, None)
            cells |= {"difference": evidence.mean, "p_corrected": evidence.p, "outcome": verdict.outcome}
        writer.writerow(cells)
    return file.getvalue()


def spread(values: Sequence[float]) -> str:
    """Format mean ± standard deviation, the latter with one significant digit, or two from 10 to 29.

    >>> spread([0.95, 0.96, 0.97]), spread([0.93, 0.96, 0.99]), spread([0.5]), spread([])
    ('0.960 ± 0.010', '0.96 ± 0.03', '0.5', '–')
    """
    if not values:
        return NOTHING
    mean, std = mean_std(values)
    if std is None:
        return f"{mean:.4g}"
    if std < 1e-9 * abs(mean) or std == 0:
        return f"{mean:.4g} ± 0"
    exponent = math.floor(math.log10(std))
    places = -exponent + (std / 10**exponent < 2.95)
    if not -4 <= places <= 6 or abs(mean) >= 1e7:
        return f"{mean:.2e} ± {std:.0e}"
    return f"{mean:.{max(0, places)}f} ± {std:.{max(0, places)}f}"


def _epochs(values: Sequence[int | None]) -> str:
    reached = _present(values)
    if not values:
        return NOTHING
    if not reached:
        return "never"
    never = len(values) - len(reached)
    mean, std = mean_std(reached)
    return f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}") + (f", {never} never" if never else "")


def _present(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None]
