"""The result of `gradcentral.compare`: its runs, their summary per optimizer and arm, and the verdicts."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradcentral.diagnostics.probing import ProbeReport
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.statistics import Paired, paired
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.summary import Row, columns
from gradcentral.experiment.verdict import Verdict, judge
from gradcentral.extras import optional

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """The result of `gradcentral.compare`; ``print`` it for the tables and verdicts.

    Attributes:
        task: the task's name.
        metric: the metric's name.
        higher_is_better: whether a larger metric is better.
        arms, optimizers, seeds: what was requested.
        all_runs: the requested runs, including those finished in earlier calls.
        checked: whether every run was checked to train as its arm requires; False for a `CustomTask`.
        out: the folder with ``results.jsonl``, ``summary.csv``, the plots and ``report.html``.
        command: the Python call that repeats the comparison.
        fingerprint: of the task: name of a part -> its description.
        probe: what GC would do to the model before training, with seed 0; None for a `CustomTask`.
    """

    task: str
    metric: str
    higher_is_better: bool
    arms: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    all_runs: tuple[Run, ...]
    checked: bool
    out: Path
    command: str
    fingerprint: dict[str, str]
    probe: ProbeReport | None = None

    @property
    def report(self) -> Path:
        """The report's file."""
        return self.out / "report.html"

    @cached_property
    def _by_key(self) -> dict[Key, Run]:
        return {run.key: run for run in self.all_runs}

    def runs(self, optimizer: str, arm: str) -> list[Run]:
        """Return the runs of one arm under one optimizer, in the order of the seeds."""
        return [self._by_key[Key(optimizer, arm, seed)] for seed in self.seeds]

    def paired(self, optimizer: str, arm: str, name: str = "test_metric") -> Paired:
        """Compare final numbers of an arm with those of ``none``: ``test_metric``, ``train_loss`` or ``test_loss``."""
        baseline, other = ([run.final(name) for run in self.runs(optimizer, which)] for which in (NONE, arm))
        return paired(baseline, other, arms=len(self.arms) - 1)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One per optimizer and arm other than ``none``, on the final test metric."""
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
        """Summarize one arm under one optimizer."""
        baseline = self.runs(optimizer, NONE)
        return Row.of(self.runs(optimizer, arm), baseline, higher_is_better=self.higher_is_better)

    @cached_property
    def rows(self) -> list[Row]:
        """One per optimizer and arm."""
        return [self.row(optimizer, arm) for optimizer in self.optimizers for arm in self.arms]

    def __rich__(self) -> Any:
        """Render the tables and verdicts on a rich console."""
        console, table_of, text = optional("rich.console"), optional("rich.table"), optional("rich.text")
        cells = columns(self.rows, self.metric)
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
            for title in cells:
                table.add_column(textwrap.fill(title, 12, break_long_words=False), justify="right")
            for row in self.rows:
                if row.optimizer == optimizer:
                    label = row.arm if not row.diverged else f"{row.arm}, {row.diverged} of {row.runs} diverged"
                    table.add_row(label, *(cell(row) for cell in cells.values()))
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
