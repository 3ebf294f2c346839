"""What a comparison found: its runs, summed up per optimizer and arm, and the verdicts."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradcentral.diagnostics.probe_report import ProbeReport
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.statistics import Paired, Verdict, epochs_to_reach, judge, mean_std, paired
from gradcentral.experiment.store import Key, Run
from gradcentral.extras import optional

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True)
class Row:
    """One arm under one optimizer; runs that diverged count in ``diverged`` and nowhere else.

    Attributes:
        optimizer, arm: which.
        runs: how many, diverged ones included.
        diverged: how many of them diverged.
        test_metric: at the end, one number a run.
        train_loss: running mean over the last epoch.
        epochs_to_baseline: the epoch in which the training loss first was at most the baseline's final one of the
            same seed; None where it never was.
        gap: how much better the metric is on training examples than on test examples, both in eval mode.
        share: part of the raw gradient's energy that GC removes or would remove, mean over a run's checked steps.
        seconds: what a run took.
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


COLUMNS: dict[str, Callable[[Row], str]] = {
    "test {metric}": lambda row: spread(row.test_metric),
    "final training loss": lambda row: spread(row.train_loss),
    "epochs to none's final loss": lambda row: _epochs(row.epochs_to_baseline),
    "generalization gap": lambda row: spread(row.gap),
    "share removed": lambda row: f"{mean_std(row.share)[0]:.0%}" if row.share else NOTHING,
}


@dataclass(frozen=True)
class Comparison:
    """The result of `gradcentral.compare`; ``print`` it for the tables and verdicts.

    Attributes:
        task: the task's name.
        metric: the metric's name.
        higher_is_better: whether more of it is better.
        arms, optimizers, seeds: what was asked for.
        records: the finished runs, those of earlier calls included.
        checked: whether every run proved that its arm did what it says; False for a trainer of one's own.
        out: the folder with ``results.jsonl``, ``summary.csv``, the plots and ``report.html``.
        command: what to type to repeat it.
        setup: what was run, part by part.
        probe: what GC would do to the first seed's model before training; None for a trainer of one's own.
    """

    task: str
    metric: str
    higher_is_better: bool
    arms: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    records: tuple[Run, ...]
    checked: bool
    out: Path
    command: str
    setup: dict[str, str]
    probe: ProbeReport | None = None

    @property
    def report(self) -> Path:
        """The report's file."""
        return self.out / "report.html"

    @cached_property
    def _by_key(self) -> dict[Key, Run]:
        return {run.key: run for run in self.records}

    def runs(self, optimizer: str, arm: str) -> list[Run]:
        """The runs of one arm under one optimizer, in the order of the seeds."""
        return [self._by_key[Key(optimizer, arm, seed)] for seed in self.seeds]

    def paired(self, optimizer: str, arm: str, name: str = "test_metric") -> Paired:
        """Final numbers of one arm against those of ``none``: ``test_metric``, ``train_loss`` or ``test_loss``."""
        baseline, other = ([run.final(name) for run in self.runs(optimizer, which)] for which in (NONE, arm))
        return paired(baseline, other, arms=len(self.arms) - 1)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for every optimizer and arm other than ``none``, on the final test metric."""
        return tuple(
            judge(
                self.paired(optimizer, arm),
                optimizer=optimizer,
                arm=arm,
                metric=self.metric,
                higher_is_better=self.higher_is_better,
                baseline=NONE,
            )
            for optimizer in self.optimizers
            for arm in self.arms
            if arm != NONE
        )

    def row(self, optimizer: str, arm: str) -> Row:
        """The summary of one arm under one optimizer."""
        runs = self.runs(optimizer, arm)
        finished = [run for run in runs if run.diverged_at is None]
        sign = 1 if self.higher_is_better else -1
        shares = [[e["share"] for e in run.epochs if e.get("share") is not None] for run in finished]
        return Row(
            optimizer,
            arm,
            runs=len(runs),
            diverged=len(runs) - len(finished),
            test_metric=_present(run.final("test_metric") for run in finished),
            train_loss=_present(run.final("train_loss") for run in finished),
            epochs_to_baseline=[
                epochs_to_reach([e["train_loss"] for e in run.epochs], target)
                for run in finished
                if (target := self._by_key[Key(optimizer, NONE, run.seed)].final("train_loss")) is not None
            ],
            gap=_present(
                None if run.train_metric is None else sign * (run.train_metric - (run.final("test_metric") or 0.0))
                for run in finished
            ),
            share=[sum(values) / len(values) for values in shares if values],
            seconds=[run.seconds for run in runs],
        )

    def table(self, optimizer: str) -> list[Row]:
        """One row an arm."""
        return [self.row(optimizer, arm) for arm in self.arms]

    def columns(self) -> dict[str, Callable[[Row], str]]:
        """Titles of the table's columns and how to write their cells; columns without any number are left out."""
        rows = [row for optimizer in self.optimizers for row in self.table(optimizer)]
        return {
            title.format(metric=self.metric): cell
            for title, cell in COLUMNS.items()
            if any(cell(row) != NOTHING for row in rows)
        }

    def to_csv(self) -> str:
        """One line for every optimizer and arm, with full precision; empty where there is no number."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        numbers = ("test_metric", "train_loss", "epochs_to_baseline", "gap", "share", "seconds")
        writer.writerow(
            ["optimizer", "arm", "runs", "diverged"]
            + [f"{name}_{what}" for name in numbers for what in ("mean", "std")]
            + ["never_reached_baseline", "difference", "low", "high", "p_corrected", "outcome"]
        )
        verdicts = {(verdict.optimizer, verdict.arm): verdict for verdict in self.verdicts}
        for row in (row for optimizer in self.optimizers for row in self.table(optimizer)):
            cells: list[Any] = [row.optimizer, row.arm, row.runs, row.diverged]
            for name in numbers:
                values = _present(getattr(row, name))
                cells += mean_std(values) if values else (None, None)
            cells.append(row.epochs_to_baseline.count(None))
            if (verdict := verdicts.get((row.optimizer, row.arm))) is not None:
                evidence = verdict.evidence
                cells += [evidence.mean, *(evidence.interval or (None, None)), evidence.p, verdict.outcome]
            writer.writerow(cells + [None] * (4 + 2 * len(numbers) + 6 - len(cells)))
        return file.getvalue()

    def __rich__(self) -> Any:
        """The tables and verdicts for a rich console."""
        console, table_of, text = optional("rich.console"), optional("rich.table"), optional("rich.text")
        parts: list[Any] = []
        for optimizer in self.optimizers:
            table = table_of.Table(
                title=f"{self.task}, {optimizer}: mean ± std of {len(self.seeds)} runs",
                title_justify="left",
                title_style="bold",
                header_style="dim",
                box=None,
                pad_edge=False,
                padding=(0, 1, 0, 0),
            )
            table.add_column("arm")
            for title in self.columns():
                table.add_column(textwrap.fill(title, 12, break_long_words=False), justify="right")
            for row in self.table(optimizer):
                label = row.arm if not row.diverged else f"{row.arm}, {row.diverged} of {row.runs} diverged"
                table.add_row(label, *(cell(row) for cell in self.columns().values()))
            parts.append(table)
            for verdict in self.verdicts:
                if verdict.optimizer == optimizer:
                    line = text.Text.assemble((f"{verdict.arm}: ", "bold"), verdict.sentence)
                    parts.append(optional("rich.padding").Padding(line, (0, 0, 0, 2)))
            parts.append("")
        return console.Group(*parts[:-1])

    def __str__(self) -> str:
        console = optional("rich.console").Console(file=io.StringIO(), width=118, color_system=None)
        console.print(self)
        return str(console.file.getvalue()).rstrip()


NOTHING = "–"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with the digits that the deviation gives meaning to: one, or two from 10 to 29.

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
    reached = [float(value) for value in values if value is not None]
    if not values:
        return NOTHING
    if not reached:
        return "never"
    never = len(values) - len(reached)
    mean, std = mean_std(reached)
    return f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}") + (f", {never} never" if never else "")


def _present(values: Any) -> list[float]:
    return [float(value) for value in values if value is not None]
