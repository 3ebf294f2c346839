"""The runs of `evidence.py`: what is trained, in which order, and the record of each. They need torch and NumPy."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from gradcentral.experiment import Task, load_task
from gradcentral.experiment.arms import ARMS, NONE, REGULARIZED
from gradcentral.experiment.data import evaluation_batches
from gradcentral.experiment.probing import probe_task
from gradcentral.experiment.store import Key
from gradcentral.experiment.tasks.networks import dead_units
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS, PAPER_RATES, Rates, optimizers
from gradcentral.experiment.training import Settings, Trainer
from gradcentral.json_lines import append, read_lines

__all__ = [
    "DECAYS",
    "FACTORS",
    "SEARCH_SEEDS",
    "STARTS",
    "Cell",
    "Pool",
    "arms_of",
    "best_rates",
    "grid",
    "grid_of_paper",
    "probe_record",
    "read_records",
    "run_all",
    "run_cell",
    "search",
    "trials",
]

PROBE_SEEDS = (0, 1, 2)
SEARCH_SEEDS = (9000, 9001)
"""Seeds of the search for learning rates, which no other command uses."""
SEARCH_UNTIL = 0.4
"""Fraction of the time limit after which the search ends, so that time remains for the runs."""
FACTORS = (1.0, 0.25, 4.0)
STARTS = {"sgd": (0.01, 0.03, 0.1, 0.3), "adamw": (1e-3, 3e-3, 1e-2, 3e-2), "lion": (1e-4, 3e-4, 1e-3, 3e-3)}
DECAYS = {"sgd": (5e-4, 0.0, 5e-3), "adamw": (0.01, 0.0, 0.1), "lion": (0.1, 0.0, 1.0)}
"""Weight decays that the search tries; the first one is used while it compares learning rates."""


class Cell(NamedTuple):
    """One run. The learning rate is ``factor`` times ``lr``."""

    task: str
    optimizer: str
    arm: str
    factor: float
    seed: int
    lr: float
    weight_decay: float

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes a run the same run when it is resumed."""
        return tuple(self)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; an absent file has none."""
    return read_lines(path, json.loads, "record") if path.exists() else []


def grid(tasks: Sequence[str], rates: Callable[[str, str], Rates], seeds: int = 5, more: int = 10) -> list[Cell]:
    """List all runs, in such an order that every prefix is useful.

    First every task at its best learning rate with few seeds, one seed after the other; then the other learning rates;
    then more seeds at the best rate.
    """
    stages = [(range(seeds), FACTORS[:1]), (range(seeds), FACTORS[1:]), (range(seeds, more), FACTORS[:1])]
    return [
        Cell(task, optimizer, arm, factor, seed, **rates(task, optimizer))
        for some, factors in stages
        for seed in some
        for task in tasks
        for optimizer in OPTIMIZERS
        for factor in factors
        for arm in arms_of(optimizer)
    ]


def grid_of_paper(seeds: int = 5) -> list[Cell]:
    """List the runs at the paper's settings."""
    return [cell for cell in grid(["cifar100"], lambda task, name: PAPER_RATES[name], seeds, seeds) if cell.factor == 1]


def arms_of(optimizer: str) -> tuple[str, ...]:
    """Return the arms that differ: without L2 weight decay, "regularized" would repeat "gradient"."""
    return tuple(arm for arm in ARMS if arm != REGULARIZED or optimizer == "sgd")


@functools.cache
def _task(name: str) -> Task:
    task = load_task(name)
    assert isinstance(task, Task)
    return task


def run_cell(cell: Cell, device: str = "cpu", epochs: int | None = None) -> dict[str, Any]:
    """Train once and return the record: what was trained, the numbers of each epoch, and the machine."""
    started = time.perf_counter()
    rates = {"lr": cell.lr * cell.factor, "weight_decay": cell.weight_decay}
    task = dataclasses.replace(_task(cell.task), optimizers=optimizers({cell.optimizer: rates}))
    key = Key(cell.optimizer, cell.arm, cell.seed)
    trainer = Trainer(task, Settings(epochs or task.epochs, device), key)
    numbers, diverged = [], False
    for epoch in trainer.epochs():
        numbers.append(epoch)
        if diverged := not (math.isfinite(epoch["train_loss"]) and math.isfinite(epoch["test_loss"])):
            break
    shares = [epoch["share"] for epoch in numbers if epoch["share"] is not None]
    inputs = next(iter(evaluation_batches(task)))[0].to(device)
    return {
        **cell._asdict(),
        "metric": task.metric_name,
        "higher_is_better": task.higher_is_better,
        "diverged_at": len(numbers) if diverged else None,
        "train_loss": [_rounded(epoch["train_loss"]) for epoch in numbers],
        "test_metric": [_rounded(epoch["test_metric"]) for epoch in numbers],
        "share": _rounded(fmean(shares)) if shares else None,
        "drift": _rounded(numbers[-1]["drift"]),
        "dead": None if diverged else _rounded(dead_units(trainer.model, inputs)),
        "data": numbers[0]["data"],
        "seconds": round(time.perf_counter() - started, 2),
        "machine": _machine(device),
    }


def probe_record(name: str) -> dict[str, Any]:
    """Return the share that the probe reports for the fresh model, for several seeds."""
    shares = [fmean(effect.share for effect in probe_task(_task(name), seed=seed).whole) for seed in PROBE_SEEDS]
    return {"task": name, "shares": [_rounded(share) for share in shares], "machine": _machine("cpu")}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


@functools.cache
def _machine(device: str) -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        processor = next(names, processor)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{processor}, one thread"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


class Pool:
    """Worker processes with one torch thread each, until a time limit."""

    def __init__(self, jobs: int, minutes: float) -> None:
        self.jobs, self._start, self._seconds = jobs, time.monotonic(), 60 * minutes
        self.failed = 0
        """The number of calls that raised an exception."""
        # The variable must be set before the workers import torch.
        os.environ["OMP_NUM_THREADS"] = "1"
        self._executor = ProcessPoolExecutor(
            jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def out_of_time(self, until: float = 1.0) -> bool:
        """Whether more than this fraction of the time has passed."""
        return time.monotonic() - self._start > until * self._seconds

    def results(
        self, function: Callable[..., dict[str, Any]], calls: Iterable[tuple[Any, ...]], until: float = 1.0
    ) -> Iterator[Any]:
        """Yield the results as they finish. Calls start in order, and none after this fraction of the time."""
        queue, running = iter(calls), set[Future[dict[str, Any]]]()
        while True:
            # A few more than the workers, so that none waits for this process.
            while len(running) < self.jobs + 2 and not self.out_of_time(until) and (call := next(queue, None)):
                running.add(self._executor.submit(function, *call))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if (error := future.exception()) is None:
                    yield future.result()
                else:  # the other runs are still of use
                    self.failed += 1
                    traceback.print_exception(error)


def search(
    pool: Pool, tasks: Sequence[str], path: Path, chosen: Mapping[str, Mapping[str, Rates]]
) -> dict[str, dict[str, Rates]]:
    """Find the learning rate and weight decay of each task and optimizer without GC, and record all trials in a file.

    Learning rates, about √10 apart, are compared first; the range is extended while its best rate is at an end. Then
    weight decays are compared at the best rate. A trial's score is the mean of the final test metric over its seeds.
    After `SEARCH_UNTIL` of the time, the best of the trials so far counts. Rates ``chosen`` earlier are kept.
    """
    records = read_records(path)
    pairs = [(task, name) for task in tasks for name in OPTIMIZERS if name not in chosen.get(task, {})]
    while not pool.out_of_time(SEARCH_UNTIL):
        known = {Cell(*(record[name] for name in Cell._fields)) for record in records}
        wanted = [cell for pair in pairs for cell in trials(*pair, records) if cell not in known]
        if not wanted:
            break
        for record in pool.results(run_cell, ((cell,) for cell in wanted), SEARCH_UNTIL):
            append(path, json.dumps(record) + "\n")
            records.append(record)
            _report(record)
    best = {task: dict(chosen.get(task, {})) for task in tasks}
    for task, optimizer in pairs:
        if (found := best_rates(task, optimizer, records)) is not None:
            best[task][optimizer] = found
    return best


def trials(task: str, optimizer: str, records: Sequence[dict[str, Any]]) -> list[Cell]:
    """Return the runs that the search needs next; all of them exist if it is complete."""
    scores = _scores(task, optimizer, records)
    decay, *other = DECAYS[optimizer]
    lrs = sorted({*STARTS[optimizer], *(lr for lr, d in scores if d == decay)})
    wanted = [(lr, decay) for lr in lrs]
    if all(trial in scores for trial in wanted):
        best = max(lrs, key=lambda lr: scores[lr, decay])
        if best in (lrs[0], lrs[-1]) and len(lrs) < len(STARTS[optimizer]) + 3:
            wanted.append((float(f"{best * (10**0.5 if best == lrs[-1] else 10**-0.5):.1g}"), decay))
        else:
            wanted += [(best, d) for d in other]
    return [Cell(task, optimizer, NONE, 1.0, seed, *trial) for trial in wanted for seed in SEARCH_SEEDS]


def best_rates(task: str, optimizer: str, records: Sequence[dict[str, Any]]) -> Rates | None:
    """Return the best learning rate and weight decay; None before the first learning rates have been tried."""
    scores = _scores(task, optimizer, records)
    if any((lr, DECAYS[optimizer][0]) not in scores for lr in STARTS[optimizer]):
        return None
    lr, weight_decay = max(scores, key=lambda trial: scores[trial])
    return {"lr": lr, "weight_decay": weight_decay}


def _scores(task: str, optimizer: str, records: Sequence[dict[str, Any]]) -> dict[tuple[float, float], float]:
    """Return the score of each (learning rate, weight decay), larger is better; a diverged run scores worst."""
    values: dict[tuple[float, float], list[float]] = {}
    for record in records:
        if (record["task"], record["optimizer"], record["arm"]) == (task, optimizer, NONE):
            final = record["test_metric"][-1] if record["diverged_at"] is None else None
            sign = 1 if record["higher_is_better"] else -1
            values.setdefault((record["lr"], record["weight_decay"]), []).append(
                -math.inf if final is None else sign * final
            )
    return {trial: fmean(some) for trial, some in values.items() if len(some) == len(SEARCH_SEEDS)}


def run_all(
    pool: Pool, cells: Sequence[Cell], path: Path, device: str = "cpu", epochs: int | None = None
) -> tuple[int, int]:
    """Train the runs that a file lacks, and append each; return how many it has of how many."""
    known = {tuple(record[name] for name in Cell._fields) for record in read_records(path)}
    missing = [cell for cell in cells if cell.identity not in known]
    done = len(cells) - len(missing)
    for record in pool.results(run_cell, ((cell, device, epochs) for cell in missing)):
        append(path, json.dumps(record) + "\n")
        _report(record)
        done += 1
    return done, len(cells)


def _report(record: dict[str, Any]) -> None:
    final = "diverged" if record["diverged_at"] else f"{record['metric']} {record['test_metric'][-1]}"
    what = ", ".join(f"{record[name]}" for name in Cell._fields)
    print(f"{what}: {final}, {record['seconds']} s", file=sys.stderr, flush=True)
