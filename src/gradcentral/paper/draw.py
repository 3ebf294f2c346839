"""All figures and statements of a task, in one go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.loading import refer_to
from gradcentral.experiment.probing import probe_task
from gradcentral.experiment.task import CustomTask, Task, check_count
from gradcentral.experiment.threads import one_thread
from gradcentral.experiment.training import check_device
from gradcentral.extras import optional
from gradcentral.layout import weight_layout
from gradcentral.paper.figure import Figure, write_csv
from gradcentral.paper.geometry import geometry
from gradcentral.paper.gradient_norms import gradient_norms
from gradcentral.paper.initial_means import initial_weight_means
from gradcentral.paper.landscape import landscape
from gradcentral.paper.learning import learning
from gradcentral.paper.operation import operation
from gradcentral.paper.statements import Statements
from gradcentral.paper.study import Study
from gradcentral.paper.theorems import measure_all

__all__ = ["FIGURES", "STATEMENTS", "Drawn", "draw_all", "statement_table"]

FIGURES = ("operation", "geometry", "initial-means", "gradient-norms", "learning", "landscape", "shares")
STATEMENTS = "statements"
_BEFORE_TRAINING = {"operation", "initial-means", "shares"}

# Enough training for weights to have moved, and one step a batch.
_STATEMENT_STEPS = 300


class Drawn(NamedTuple):
    """What `draw_all` made.

    Attributes:
        out: the folder with a PNG, an SVG and a CSV of every figure, and ``statements.csv``.
        titles: of the figures, by name.
        statements: the paper's, measured, and in ``statements.left_out`` those that this network has nothing for; empty
            where they were not asked for.
    """

    out: Path
    titles: dict[str, str]
    statements: Statements


def draw_all(
    task: Task | str | Path = "digits",
    *,
    out: str | Path | None = None,
    only: Sequence[str] | None = None,
    optimizer: str | None = None,
    seeds: int = 5,
    epochs: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Drawn:
    """Measure and draw the paper's figures and statements on a task's own network and data.

    Args:
        task: a `Task`, a file that defines ``task``, or the name of a built-in task.
        out: output folder; by default ``runs/figures-`` and the task's name.
        only: of `FIGURES` and ``"statements"``; by default all.
        optimizer: one of the task's; by default its first.
        seeds: how many runs the numbers with a spread are of.
        epochs: instead of the task's own.
        device: where to train and measure, as torch names it; it must have double precision.
        progress: show how each figure goes.

    Raises:
        TaskError: the task or an option is not usable; nothing that trains is centered; a single step of training.
    """
    reference = refer_to(task)
    loaded = reference.task
    if isinstance(loaded, CustomTask):
        raise TaskError(
            f"task {loaded.name!r} has a trainer of its own, into which the figures can't look: give a Task"
        )
    chosen = _chosen(only)
    if optimizer is not None and optimizer not in loaded.optimizers:
        raise TaskError(f"optimizer: there is no {optimizer!r}; there is {', '.join(loaded.optimizers)}")
    check_count("seeds", seeds)
    if epochs is not None:
        check_count("epochs", epochs)
    _check_device(device)
    study = Study(
        loaded,
        task,
        optimizer if optimizer is not None else next(iter(loaded.optimizers)),
        tuple(range(seeds)),
        loaded.epochs if epochs is None else epochs,
        track=lambda iterable, total: iterable,
        device=device,
    )
    _check(study, chosen)
    folder = Path(out) if out is not None else Path("runs") / f"figures-{loaded.name}"
    folder.mkdir(parents=True, exist_ok=True)
    titles: dict[str, str] = {}
    statements = Statements()
    with one_thread(), _Bars(progress) as bars:
        for name in chosen:
            study = replace(study, track=bars.track(name))
            if name == STATEMENTS:
                statements = _statements(study)
                _write(statements, folder)
            else:
                figure = _make(name, study, folder, progress)
                figure.write(folder, name)
                titles[name] = figure.title
            bars.done(name)
    return Drawn(folder, titles, statements)


def statement_table(statements: Statements) -> Any:
    """The statements for a rich console: what was measured against what it must not exceed, or why it was not."""
    table = optional("rich.table").Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, justify in (("statement", "left"), ("measured", "right"), ("bound", "right"), ("without GC", "right")):
        table.add_column(title, justify=justify)
    table.add_column("holds")
    for m in statements:
        without = "" if m.without is None else f"{m.without:.2g}"
        what = f"{m.statement} ({m.source})\n  {m.formula}"
        table.add_row(what, f"{m.value:.2g}", f"{m.bound:.2g}", without, "yes" if m.holds else "NO")
    for left in statements.left_out:
        table.add_row(f"{left.statement} ({left.source})\n  left out: {left.reason}", "", "", "", "–")
    return table


def _check_device(device: str) -> None:
    check_device(device, amp=False)
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise TaskError(f"device: {device!r} has no double precision, which the statements need; use cpu") from error


def _check(study: Study, chosen: Sequence[str]) -> None:
    if not study.examples:
        layout = weight_layout(study.fresh_model())
        reasons = ", ".join(dict.fromkeys(layout.skipped.values())) or "those do not train"
        raise TaskError(
            f"task {study.task.name!r}: nothing that trains is centered, so there is nothing to draw: "
            f"{layout.summary()}; {reasons}"
        )
    if study.steps < 2 and (trained := [name for name in chosen if name not in _BEFORE_TRAINING]):
        raise TaskError(
            f"epochs: {study.epochs} of this task is 1 step, and {', '.join(trained)} need at least 2: give more"
        )


def _make(name: str, study: Study, folder: Path, progress: bool) -> Figure:
    if name == "learning":
        return learning(study, folder / "runs", progress=progress)
    make: dict[str, Callable[[Study], Figure]] = {
        "operation": operation,
        "geometry": geometry,
        "initial-means": initial_weight_means,
        "gradient-norms": gradient_norms,
        "landscape": landscape,
        "shares": _shares,
    }
    try:
        return make[name](study)
    except NotImplementedError as error:
        raise TaskError(
            f"{name}: torch can't do this with the task's network: {error}; leave it out of `only`"
        ) from error


def _shares(study: Study) -> Figure:
    (report,) = study.track((probe_task(study.task, seed=seed, device=study.device) for seed in (study.seed,)), 1)
    title = f"{study.task.name}: where GC acts before training"
    columns = ("name", "kind", "share", "spread", "finding")
    rows = [[getattr(layer, column) for column in columns] for layer in report.layers]
    return Figure(title, report.plot, columns, rows)


def _statements(study: Study) -> Statements:
    task = study.task
    steps = min(study.steps, _STATEMENT_STEPS)
    batches = study.track(itertools.islice(study.batches(study.seed), steps), steps)
    try:
        return measure_all(study.fresh_model(), task.loss, batches, task.optimizers[study.optimizer])
    except ValueError as error:
        raise TaskError(f"{STATEMENTS}: {error}") from error


def _write(statements: Statements, folder: Path) -> None:
    header = ("source", "statement", "formula", "value", "bound", "allowance", "holds", "without", "where")
    rows = [[getattr(measured, field) for field in header] for measured in statements]
    rows += [[left.source, left.statement, *[None] * 6, f"left out: {left.reason}"] for left in statements.left_out]
    write_csv(folder / f"{STATEMENTS}.csv", header, rows)


def _chosen(only: Sequence[str] | None) -> tuple[str, ...]:
    known = (*FIGURES, STATEMENTS)
    if only is None:
        return known
    if isinstance(only, str):
        raise TaskError(f"only: give a list of names, such as [{only!r}]")
    for name in only:
        if name not in known:
            raise TaskError(f"only: there is no {name!r}; there is {', '.join(known)}")
    return tuple(name for name in known if name in only)


class _Bars:
    """A bar for each figure while it is made, on a terminal; when it is done, a line."""

    def __init__(self, show: bool) -> None:
        self._console = optional("rich.console").Console(quiet=not show, highlight=False)
        self._progress: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def track(self, name: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
        """Shows how far an iterable has been taken."""

        def track(iterable: Iterable[Any], total: int) -> Iterable[Any]:
            if not self._console.is_terminal:
                return iterable
            if self._progress is None:
                # Only now: a comparison shows its own progress, and a terminal has room for one.
                self._progress = optional("rich.progress").Progress(console=self._console, transient=True)
                self._progress.start()
            return self._progress.track(iterable, total=total, description=name)  # type: ignore[no-any-return]

        return track

    def done(self, name: str) -> None:
        """A figure is finished."""
        self._stop()
        self._console.print(f"{name}: done")

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
