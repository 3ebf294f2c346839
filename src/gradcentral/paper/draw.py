"""`draw_all`: draw the figures and measure the statements of the paper for one task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.determinism import derive, one_thread, seed_everything
from gradcentral.experiment.errors import TaskError, exits_named
from gradcentral.experiment.loading import load_task
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.task import CustomTask, Task, check_count, check_seed_count
from gradcentral.experiment.training import check_device
from gradcentral.extras import optional
from gradcentral.layout import weight_layout
from gradcentral.paper.figures.before_training import initial_means_figure, operation_figure, shares_figure
from gradcentral.paper.figures.training import geometry_figure, gradient_norms_figure, landscape_figure, learning_figure
from gradcentral.paper.statements import Measurements, measure_all
from gradcentral.paper.study import Figure, Study
from gradcentral.paper.trained_weights import read_weights
from gradcentral.tables import csv_text

__all__ = ["FIGURES", "STATEMENTS", "FigureSet", "draw_all", "statement_table"]

FIGURES: dict[str, Callable[[Study], Figure]] = {
    "operation": operation_figure,
    "geometry": geometry_figure,
    "initial-means": initial_means_figure,
    "gradient-norms": gradient_norms_figure,
    "learning": learning_figure,
    "landscape": landscape_figure,
    "shares": shares_figure,
}
"""The figures that `draw_all` draws, by name."""
STATEMENTS = "statements"
"""The name of the table of statements in ``draw_all(only=…)``."""

_WITHOUT_TRAINING = {"operation", "initial-means", "shares"}
# Enough steps for the weights to move away from w⁰, but few enough to measure the statements in seconds.
_STATEMENT_STEPS = 300


class FigureSet(NamedTuple):
    """The output folder, the titles of the figures in it by name, and the statements, if they were selected."""

    out: Path
    titles: dict[str, str]
    statements: Measurements


@exits_named()
def draw_all(
    task: Task | str | Path = "digits",
    *,
    out: str | Path | None = None,
    only: Sequence[str] | None = None,
    optimizer: str | None = None,
    seeds: int = 5,
    epochs: int | None = None,
    device: str = "cpu",
    weights: str | Path | None = None,
    progress: bool = True,
) -> FigureSet:
    """Draw the paper's figures as PNG, SVG and CSV, and measure its statements, with a task's own network and data.

    Args:
        task: a `Task`, a file that defines ``task``, or the name of a built-in task.
        out: the output folder; by default ``runs/figures-<task name>``.
        only: names from ``FIGURES`` and ``"statements"``; by default all.
        optimizer: the name of one of the task's optimizers; by default the first.
        seeds: the number of runs behind each interval.
        epochs: the number of epochs per run; by default the task's.
        device: the torch device to train and measure on; it must support double precision.
        weights: a file with trained weights of the task's network: a state dict, as safetensors or as saved by
            ``torch.save``. The figure "initial-means" then shows them beside the network's initial weights.
        progress: whether to show progress.

    Raises:
        TaskError: the task or an option is not usable; no trainable parameter is centered; there is only one step; the
            weights do not fit the task's network.
        ResultsError: ``out`` cannot be written, or holds files of these names that gradcentral did not write.
    """
    start = Path.cwd()  # before the task's file, which may change it
    loaded = load_task(task)
    if isinstance(loaded, CustomTask):
        raise TaskError(f"task {loaded.name!r} is a CustomTask, whose training steps are not accessible; give a Task")
    chosen = _chosen(only)
    if optimizer is not None and optimizer not in loaded.optimizers:
        raise TaskError(f"optimizer: unknown optimizer {optimizer!r}; choose from {', '.join(loaded.optimizers)}")
    check_seed_count(seeds)
    epochs = loaded.epochs if epochs is None else epochs
    check_count("epochs", epochs)
    folder = OutputFolder(start / Path(out or f"runs/figures-{loaded.name}").expanduser())
    optimizer = optimizer or next(iter(loaded.optimizers))
    study = Study(loaded, task, optimizer, tuple(range(seeds)), epochs, device, folder.path / "runs", progress)
    _check(study, chosen)
    if weights is not None:
        study = _with_weights(study, start / Path(weights).expanduser(), chosen)
    kinds = {name: ("csv",) if name == STATEMENTS else ("png", "svg", "csv") for name in chosen}
    folder.claim([f"{name}.{kind}" for name, kinds in kinds.items() for kind in kinds])
    titles: dict[str, str] = {}
    statements = Measurements()
    with one_thread():
        for name in chosen:
            with _tracked(study, name) as tracked:
                if name == STATEMENTS:
                    statements = _statements(tracked, folder)
                else:
                    figure = _figure(name, tracked, chosen)
                    figure.write(folder, name)
                    titles[name] = figure.title
    return FigureSet(folder.path, titles, statements)


def statement_table(statements: Measurements) -> Any:
    """Return a rich table of the statements: each number with its bound, or the reason for skipping it."""
    table = optional("rich.table").Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("statement", "measured", "bound", "without GC", "holds"):
        table.add_column(title, justify="left" if title in ("statement", "holds") else "right")
    for m in statements:
        numbers = ["" if number is None else f"{number:.2g}" for number in (m.value, m.bound, m.without)]
        table.add_row(f"{m.statement} ({m.source})\n  {m.formula}", *numbers, "yes" if m.holds else "NO")
    for skipped in statements.skipped:
        table.add_row(f"{skipped.statement} ({skipped.source})\n  skipped: {skipped.reason}", "", "", "", "–")
    return table


@contextmanager
def _tracked(study: Study, name: str) -> Iterator[Study]:
    """Yield the study with a progress bar on a terminal; afterwards print one line."""
    console = optional("rich.console").Console(quiet=not study.progress, highlight=False)
    # A terminal can show only one progress display, and a comparison has its own.
    disable = not (study.progress and console.is_terminal) or name == "learning"
    with optional("rich.progress").Progress(console=console, transient=True, disable=disable) as bars:
        yield replace(study, track=partial(bars.track, description=name))
    console.print(f"{name}: done")


def _figure(name: str, study: Study, chosen: Sequence[str]) -> Figure:
    try:
        return FIGURES[name](study)
    except NotImplementedError as error:
        others = [other for other in chosen if other != name] or [other for other in FIGURES if other != name]
        raise TaskError(
            f"{name}: torch cannot compute this for the task's network: {error}; choose only {', '.join(others)}"
        ) from error


def _statements(study: Study, folder: OutputFolder) -> Measurements:
    steps = min(study.steps, _STATEMENT_STEPS)
    batches = study.track(itertools.islice(study.batches(study.seeds[0]), steps), steps)
    try:
        with preserve_state():
            seed_everything(derive(study.seeds[0], "training"))  # dropout draws random numbers
            found = measure_all(study.fresh_model(), study.task.loss, batches, study.task.optimizers[study.optimizer])
    except ValueError as error:
        raise TaskError(f"{STATEMENTS}: {error}") from error
    header = ("source", "statement", "formula", "value", "bound", "allowance", "holds", "without", "where")
    rows = [[getattr(measured, field) for field in header] for measured in found]
    rows += [[s.source, s.statement, *[None] * 6, f"skipped: {s.reason}"] for s in found.skipped]
    folder.write(f"{STATEMENTS}.csv", csv_text([header, *rows]))
    return found


def _with_weights(study: Study, path: Path, chosen: Sequence[str]) -> Study:
    if "initial-means" not in chosen:
        raise TaskError("weights: only the figure initial-means shows them; add it to only")
    return replace(study, weights=read_weights(path, weight_layout(study.fresh_model())))


def _chosen(only: Sequence[str] | None) -> tuple[str, ...]:
    known = (*FIGURES, STATEMENTS)
    if only is None:
        return known
    if isinstance(only, str):
        raise TaskError(f"only: give a list of names, such as only=[{only!r}]")
    for name in only:
        if name not in known:
            raise TaskError(f"only: unknown figure {name!r}; choose from {', '.join(known)}")
    return tuple(name for name in known if name in only)


def _check(study: Study, chosen: Sequence[str]) -> None:
    check_device(study.device, amp=False)
    try:
        torch.empty(1, dtype=torch.float64, device=study.device)
    except (TypeError, RuntimeError) as error:
        raise TaskError(f"device: {study.device!r} has no double precision, which the figures need; use cpu") from error
    if not study.example_layers:
        layout = weight_layout(study.fresh_model())
        reasons = ", ".join(dict.fromkeys(layout.skipped.values())) or "they do not train"
        raise TaskError(
            f"task {study.task.name!r}: no trainable parameter is centered, so there is nothing to draw: "
            f"{layout.summary()}; {reasons}"
        )
    if study.steps < 2 and (trained := [name for name in chosen if name not in _WITHOUT_TRAINING]):
        raise TaskError(f"epochs: a run is a single step, and {', '.join(trained)} need at least 2; set epochs to 2")
