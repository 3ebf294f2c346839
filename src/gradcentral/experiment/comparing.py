"""`compare`: train with and without GC, from the same weights on the same batches, and say whether it helped."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradcentral.experiment.arms import ARMS, NONE
from gradcentral.experiment.backends import check_backend
from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.display import Display
from gradcentral.experiment.errors import ArmError, TaskError
from gradcentral.experiment.fingerprint import fingerprint
from gradcentral.experiment.loading import TaskReference, refer_to
from gradcentral.experiment.probing import probe_task
from gradcentral.experiment.store import Key, Run, Store
from gradcentral.experiment.task import CustomTask, Task, check_count
from gradcentral.experiment.training import Settings, check_device
from gradcentral.experiment.workers import default_jobs, run_all

__all__ = ["compare"]

DEFAULT_SEEDS = 5
CUSTOM_OPTIMIZER = "custom"


def compare(
    task: Task | CustomTask | Callable[..., Any] | str | Path,
    *,
    seeds: int | Sequence[int] = DEFAULT_SEEDS,
    epochs: int | None = None,
    arms: Sequence[str] = ARMS,
    optimizers: Sequence[str] | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    device: str = "cpu",
    amp: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Comparison:
    """Train a task with and without Gradient Centralization and judge whether it helped.

    Runs of one seed are paired: identical initial weights, identical batches. Every run checks that its arm did what
    it says. Finished runs are kept in ``out`` one by one: stopped at any moment, the same call goes on from there,
    and asking for more seeds, arms or optimizers runs only what is missing.

    Args:
        task: a `Task`, a `CustomTask`, a bare ``run(seed, arm)`` function, a file that defines ``task``, or the name
            of a built-in task: ``digits``, ``digits-batchnorm``, ``digits-vit``.
        seeds: how many (0, 1, …), or which.
        epochs: instead of the task's own.
        arms: of ``none``, ``gradient`` and ``update``; ``none`` must be among them.
        optimizers: names of those of the task's to use; all of them by default.
        jobs: worker processes, each with one torch thread. 1 runs in this process, with the threads torch has here.
            By default one a core on the CPU and 1 on an accelerator; on a cluster all its workers.
        backend: where the workers are: ``"loky"``, processes of this machine; ``"ray"`` or ``"dask"``, those of a
            cluster (see docs/scaling.md).
        device: where to train, as torch names it.
        amp: train in mixed precision: bfloat16 where the device has it, else float16 with loss scaling.
        out: output folder; by default ``runs/`` and the task's name.
        resume: keep and use the finished runs in ``out``; False moves them aside.
        progress: show how it goes, live on a terminal, else a line a run.

    Returns:
        A `Comparison`.

    Raises:
        TaskError: the task or an option is not usable.
        ResultsError: ``out`` holds runs of another task, or is in use.
        ArmError: a run did not do what its arm says, or paired runs did not start alike.
        RunError: the task's own code raised in a run.
    """
    reference = refer_to(task)
    loaded = reference.task
    arms, optimizers, seeds = _arms(arms), _optimizers(loaded, optimizers), _seeds(seeds)
    if jobs is not None:
        check_count("jobs", jobs)
    check_backend(backend)
    settings = _settings(loaded, epochs, device, amp)
    setup = fingerprint(reference, settings, optimizers)
    # Before the runs: where it fails, they would too.
    probed = probe_task(loaded, seed=seeds[0], device=device, amp=amp) if isinstance(loaded, Task) else None
    keys = [Key(optimizer, arm, seed) for seed in seeds for optimizer in optimizers for arm in arms]
    with Store(Path(out) if out is not None else Path("runs") / loaded.name) as store:
        store.begin(setup, resume=resume)
        before = [store.runs[key] for key in keys if key in store.runs]
        missing = [key for key in keys if key not in store.runs]
        with (
            _progress_file(store.folder) as file,
            Display(keys, before, settings.epochs if settings else None, loaded.metric_name, file, progress) as display,
        ):
            pairs = _Pairs(before)
            if jobs is None and backend == "loky":
                jobs = default_jobs(device, len(missing))
            if missing:
                count = None if jobs is None else min(jobs, len(missing))
                for run in run_all(reference, missing, settings, jobs=count, progress=file, backend=backend):
                    pairs.check(run)
                    store.add(run)
                    display.finished(run)
        comparison = Comparison(
            task=loaded.name,
            metric=loaded.metric_name,
            higher_is_better=loaded.higher_is_better,
            arms=arms,
            optimizers=optimizers,
            seeds=seeds,
            records=tuple(store.runs[key] for key in keys),
            checked=isinstance(loaded, Task),
            out=store.folder,
            command=_command(reference, seeds, epochs, arms, optimizers, device, amp),
            setup=setup,
            probe=probed,
        )
        from gradcentral.experiment.report import write_report

        write_report(comparison)
    return comparison


class _Pairs:
    """Refuses runs of one seed that did not start from the same weights or saw other batches."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._first: dict[tuple[int, str], tuple[str, Run]] = {}
        for run in runs:
            self.check(run)

    def check(self, run: Run) -> None:
        found = {"initial weights": run.weights}
        found |= {f"batches of epoch {epoch['epoch']}": epoch.get("data") for epoch in run.epochs}
        for what, value in found.items():
            if value is None:
                continue
            other, first = self._first.setdefault((run.seed, what), (value, run))
            if other != value:
                raise ArmError(
                    f"runs of seed {run.seed} are not paired: ({run.key}) and ({first.key}) have different {what}; "
                    "the task must draw its random numbers from torch, NumPy or random, without a seed of its own"
                )


def _arms(arms: Sequence[str]) -> tuple[str, ...]:
    chosen = _names("arms", arms, ARMS)
    if NONE not in chosen:
        raise TaskError(f"arms: {NONE!r} must be among them, it is what the others are compared with")
    if len(chosen) == 1:
        raise TaskError(f"arms: {NONE!r} alone is nothing to compare; add {' or '.join(map(repr, ARMS[1:]))}")
    return tuple(arm for arm in ARMS if arm in chosen)


def _optimizers(task: Task | CustomTask, optimizers: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(task, CustomTask):
        if optimizers is not None:
            raise TaskError("optimizers: a CustomTask brings its own trainer; leave them out")
        return (CUSTOM_OPTIMIZER,)
    return tuple(task.optimizers) if optimizers is None else _names("optimizers", optimizers, tuple(task.optimizers))


def _names(field: str, chosen: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(chosen, str):
        raise TaskError(f"{field}: give a list of names, such as [{chosen!r}]")
    for name in chosen:
        if name not in known:
            raise TaskError(f"{field}: there is no {name!r}; there is {', '.join(known)}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise TaskError(f"{field}: name at least one, each once; there is {', '.join(known)}")
    return tuple(chosen)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int):
        check_count("seeds", seeds)
        return tuple(range(seeds))
    if (
        not seeds
        or len(set(seeds)) != len(seeds)
        or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    ):
        raise TaskError(f"seeds: give how many, or different whole numbers from 0 to 2**32 - 1, not {seeds!r}")
    return tuple(seeds)


def _settings(task: Task | CustomTask, epochs: int | None, device: str, amp: bool) -> Settings | None:
    if isinstance(task, CustomTask):
        for name, given in (("epochs", epochs is not None), ("device", device != "cpu"), ("amp", amp)):
            if given:
                raise TaskError(f"{name}: a CustomTask brings its own trainer; set it there")
        return None
    if epochs is not None:
        check_count("epochs", epochs)
    check_device(device, amp)
    return Settings(task.epochs if epochs is None else epochs, device, amp)


@contextmanager
def _progress_file(folder: Path) -> Iterator[Path]:
    for left_over in folder.glob("progress-*.jsonl"):  # of a comparison that was killed
        left_over.unlink(missing_ok=True)
    path = folder / f"progress-{os.getpid()}.jsonl"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _command(
    reference: TaskReference,
    seeds: tuple[int, ...],
    epochs: int | None,
    arms: tuple[str, ...],
    optimizers: tuple[str, ...],
    device: str,
    amp: bool,
) -> str:
    """What to type, or to write in Python for a task that has no file, to get the same runs on any machine."""
    task = reference.task
    count = len(seeds) if seeds == tuple(range(len(seeds))) else None
    options: dict[str, Any] = {"seeds": count if count is not None else seeds}
    if epochs is not None:
        options["epochs"] = epochs
    if arms != ARMS:
        options["arms"] = arms
    if isinstance(task, Task) and optimizers != tuple(task.optimizers):
        options["optimizers"] = optimizers
    if device != "cpu":
        options["device"] = device
    if amp:
        options["amp"] = True
    if reference.address.kind == "value":
        return f"gradcentral.compare(task, {', '.join(f'{name}={value!r}' for name, value in options.items())})"
    source = task.name if reference.address.kind == "built-in" else Path(reference.address.location).name
    words = ["gradcentral", "compare", source]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if name == "seeds" and len(seeds) == 1 and count is None:
            text += ","  # which seed, not how many
        words += [f"--{name}"] if value is True else [f"--{name}", text]
    return shlex.join(words)
