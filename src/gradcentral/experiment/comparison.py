"""The result of `gradcentral.compare`: its runs, one row of numbers per optimizer and arm, and the verdicts."""

from __future__ import annotations

import html
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from gradcentral.diagnostics.probe_report import ProbeReport
from gradcentral.experiment.arms import NONE, REGULARIZED
from gradcentral.experiment.statistics import Paired, epochs_to_reach, mean_std, paired
from gradcentral.experiment.store import REPORT, Key, Run
from gradcentral.experiment.verdict import Verdict, judge
from gradcentral.extras import optional
from gradcentral.tables import csv_text

__all__ = ["Comparison", "Row", "spread"]

NOTHING = "–"
# Both center only the gradient if there is no L2 weight decay.
_EQUAL_ARMS = ("gradient", REGULARIZED)


@dataclass(frozen=True)
class Row:
    """Results of one arm under one optimizer; diverged runs count only in ``runs`` and ``diverged``.

    Attributes:
        optimizer, arm: names of the optimizer and the arm.
        runs, diverged: number of runs, and how many of them diverged.
        test_metric: final value of each run in which it is finite.
        train_loss: running mean over the last epoch of each run.
        epochs_to_baseline: for each run, the first epoch with a training loss of at most the final loss of the
            baseline's run of the same seed; None if there is none.
        gap: difference by which the metric is better on training than on test examples, both in eval mode.
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


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "test {metric}": lambda row: spread(row.test_metric),
    "final training loss": lambda row: spread(row.train_loss),
    "epochs to none's final loss": lambda row: _epochs(row.epochs_to_baseline),
    "train-test gap": lambda row: spread(row.gap),
    "share removed": lambda row: f"{mean_std(row.share)[0]:.0%}" if row.share else NOTHING,
}


@dataclass(frozen=True)
class Comparison:
    """The result of `gradcentral.compare`; ``print`` it for the tables and verdicts.

    Attributes:
        task, metric, higher_is_better: the names of the task and its metric, and whether a larger metric is better.
        arms, optimizers, seeds: the requested arms, optimizers and seeds.
        all_runs: the requested runs in the order of the seeds, including those finished in earlier calls.
        checked: whether every run was checked to train as its arm requires; False for a `CustomTask`.
        out: the folder with ``results.jsonl``, ``summary.csv``, the plots and ``report.html``.
        command: the Python call that repeats the comparison.
        fingerprint: fingerprint of the task: name of a part -> its description.
        probe: effect that GC would have on the model before training, with seed 0; None for a `CustomTask`.
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
        return self.out / REPORT

    def runs(self, optimizer: str, arm: str) -> list[Run]:
        """Return the runs of one arm under one optimizer, in the order of the seeds."""
        return [run for run in self.all_runs if (run.optimizer, run.arm) == (optimizer, arm)]

    def evidence(self, optimizer: str, arm: str, name: str = "test_metric") -> Paired:
        """Compare final numbers of an arm with those of ``none``: ``test_metric``, ``train_loss`` or ``test_loss``."""
        baseline, other = ([_result(run, name) for run in self.runs(optimizer, which)] for which in (NONE, arm))
        return paired(baseline, other, arms=len(self.arms) - 1)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict per optimizer and arm other than ``none``, on the final test metric."""
        return tuple(
            judge(self.evidence(optimizer, arm), optimizer, arm, self.metric, self.higher_is_better)
            for optimizer in self.optimizers
            for arm in self.arms
            if arm != NONE
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the runs that a reader of the verdicts needs."""
        notes = []
        seeds: dict[str, list[int]] = {}
        for run in self.all_runs:
            if run.weights is not None and run.seed not in (same := seeds.setdefault(run.weights, [])):
                same.append(run.seed)
        for same in (same for same in seeds.values() if len(same) > 1):
            which = f"All {len(same)} seeds" if len(same) == len(self.seeds) else f"Seeds {', '.join(map(str, same))}"
            notes.append(
                f"{which} start from the same weights (a pretrained model, or a factory that sets its own seed), so "
                "the intervals do not cover the variation between initializations."
            )
        for optimizer in self.optimizers:
            gradient, regularized = ([_losses(run) for run in self.runs(optimizer, arm)] for arm in _EQUAL_ARMS)
            if gradient and gradient == regularized:
                notes.append(
                    f"Arms gradient and regularized are identical under {optimizer}, which has no L2 weight decay to "
                    "center (it is decoupled, or 0)."
                )
        if undefined := [run.key for run in self.all_runs if math.isnan(_result(run, "test_metric") or 0)]:
            notes.append(f"The final test {self.metric} is not finite in {len(undefined)} runs: {_listed(undefined)}.")
        return tuple(notes)

    def row(self, optimizer: str, arm: str) -> Row:
        """Summarize one arm under one optimizer."""
        runs = self.runs(optimizer, arm)
        finished = [run for run in runs if run.diverged_at is None]
        sign = 1 if self.higher_is_better else -1
        shares = [_present(epoch.get("share") for epoch in run.epochs) for run in finished]
        targets = {run.seed: run.final("train_loss") for run in self.runs(optimizer, NONE)}
        return Row(
            optimizer,
            arm,
            runs=len(runs),
            diverged=len(runs) - len(finished),
            test_metric=_present(run.final("test_metric") for run in finished),
            train_loss=_present(run.final("train_loss") for run in finished),
            epochs_to_baseline=[
                epochs_to_reach([epoch["train_loss"] for epoch in run.epochs], target)
                for run in finished
                if (target := targets[run.seed]) is not None
            ],
            gap=[
                sign * (run.train_metric - metric)
                for run in finished
                if run.train_metric is not None and (metric := run.final("test_metric")) is not None
            ],
            share=[fmean(values) for values in shares if values],
            seconds=[run.seconds for run in runs],
        )

    @cached_property
    def rows(self) -> list[Row]:
        """One row per optimizer and arm."""
        return [self.row(optimizer, arm) for optimizer in self.optimizers for arm in self.arms]

    @cached_property
    def columns(self) -> dict[str, Callable[[Row], str]]:
        """Titles of the table's columns and the formatters of their cells, without columns that have no numbers."""
        shown = {t: cell for t, cell in _COLUMNS.items() if any(cell(row) != NOTHING for row in self.rows)}
        return {title.format(metric=self.metric): cell for title, cell in shown.items()}

    def to_csv(self) -> str:
        """Format one line per optimizer and arm, with full precision; cells without a number are empty."""
        verdicts = {(verdict.optimizer, verdict.arm): verdict for verdict in self.verdicts}
        lines: list[dict[str, Any]] = []
        for row in self.rows:
            line: dict[str, Any] = {name: getattr(row, name) for name in ("optimizer", "arm", "runs", "diverged")}
            for name in ("test_metric", "train_loss", "epochs_to_baseline", "gap", "share", "seconds"):
                values = _present(getattr(row, name))
                line[f"{name}_mean"], line[f"{name}_std"] = mean_std(values) if values else (None, None)
            line["never_reached_baseline"] = row.epochs_to_baseline.count(None)
            verdict = verdicts.get((row.optimizer, row.arm))
            line["difference"] = verdict and verdict.evidence.mean
            line["low"], line["high"] = (verdict and verdict.evidence.interval) or (None, None)
            line["p_corrected"] = verdict and verdict.evidence.p
            line["outcome"] = verdict and verdict.outcome
            lines.append(line)
        return csv_text([[*lines[0]], *([*line.values()] for line in lines)])

    def __rich__(self) -> Any:
        """Render the tables and verdicts on a rich console."""
        rich_table, rich_text = optional("rich.table"), optional("rich.text")
        parts: list[Any] = []
        for optimizer in self.optimizers:
            title = f"{self.task}, {optimizer}: mean ± std of {len(self.seeds)} runs"
            styles = {"title_justify": "left", "title_style": "bold", "header_style": "dim", "box": None}
            table = rich_table.Table("arm", title=title, **styles)
            for title in self.columns:
                table.add_column(textwrap.fill(title, 12, break_long_words=False), justify="right")
            for row in (row for row in self.rows if row.optimizer == optimizer):
                label = row.arm if not row.diverged else f"{row.arm}, {row.diverged} of {row.runs} diverged"
                table.add_row(label, *(cell(row) for cell in self.columns.values()))
            parts.append(table)
            for verdict in (verdict for verdict in self.verdicts if verdict.optimizer == optimizer):
                line = rich_text.Text.assemble((f"{verdict.arm}: ", "bold"), verdict.sentence)
                parts.append(optional("rich.padding").Padding(line, (0, 0, 0, 2)))
            parts.append("")
        for note in self.notes:
            parts += [rich_text.Text.assemble(("note: ", "bold"), note), ""]
        return optional("rich.console").Group(*parts[:-1])

    def _repr_html_(self) -> str:
        """Show the report below a notebook's cell, in a frame of its own so that neither changes the other's style."""
        page = html.escape(self.report.read_text(encoding="utf-8"), quote=True)
        style = "width: 100%; height: 900px; border: 1px solid #8886; border-radius: 6px; resize: vertical"
        return f'<iframe title="Report of {html.escape(self.task)}" srcdoc="{page}" style="{style}"></iframe>'

    def __str__(self) -> str:
        rich = optional("rich.console")
        # In a notebook, rich would display the tables instead of writing them to the file.
        console = rich.Console(file=io.StringIO(), width=118, color_system=None, force_jupyter=False)
        console.print(self)
        return str(console.file.getvalue()).rstrip()


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


def _listed(keys: Sequence[Key]) -> str:
    more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
    return "; ".join(map(str, keys[:5])) + more


def _result(run: Run, name: str) -> float | None:
    """Return a final number for `paired`: None if the run diverged, and NaN if the number was not finite."""
    value = run.final(name)
    return math.nan if value is None and run.diverged_at is None else value


def _losses(run: Run) -> list[float | None]:
    return [epoch["train_loss"] for epoch in run.epochs]


def _epochs(values: Sequence[int | None]) -> str:
    reached = _present(values)
    if not reached:
        return "never" if values else NOTHING
    mean, std = mean_std(reached)
    never = len(values) - len(reached)
    return f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}") + (f", {never} never" if never else "")


def _present(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None]
