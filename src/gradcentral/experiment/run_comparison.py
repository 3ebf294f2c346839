"""`compare`: train with and without GC, from the same weights on the same batches, and judge whether it helped."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import ARMS, DEFAULT_ARMS, NONE
from gradcentral.experiment.comparison import Comparison
from gradcentral.experiment.errors import ArmError, ResultsError, TaskError
from gradcentral.experiment.fingerprint import fingerprint
from gradcentral.experiment.loading import AnyTask, find_task
from gradcentral.experiment.probing import probe_task, read_probe, write_probe
from gradcentral.experiment.progress import Progress
from gradcentral.experiment.report import write_report
from gradcentral.experiment.store import PROBE, Key, Run, Store
from gradcentral.experiment.task import CustomTask, Task, check_count, check_seed_count
from gradcentral.experiment.training import Settings, check_device
from gradcentral.experiment.workers import check_backend, run_all

__all__ = ["compare"]


@contextmanager
def _preserve_working_directory() -> Iterator[None]:
    folder = Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)


@_preserve_working_directory()
@preserve_state()
def compare(
    task: Task | CustomTask | Callable[..., Any] | str | Path,
    *,
    seeds: int | Sequence[int] = 5,
    epochs: int | None = None,
    arms: Sequence[str] = DEFAULT_ARMS,
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

    Runs of one seed are paired: they have identical initial weights and identical batches. Every run checks that it
    trains as its arm requires. Each finished run is stored in ``out`` immediately: after an interruption, the same call
    continues with the missing runs, and a call with more seeds, arms or optimizers adds only those. Runs of another
    task are never mixed in: every call compares the data, the initial weights and two training steps with those of the
    stored runs.

    Args:
        task: a `Task`, a `CustomTask`, a bare ``run(seed, arm)`` function, a file that defines ``task``, or the name
            of a built-in task: ``digits``, ``digits-batchnorm`` or ``digits-vit``, on data of scikit-learn, or one of
            ``gradcentral.experiment.tasks.SUITE``.
        seeds: number of seeds (0, 1, …), or a list of seeds.
        epochs: epochs per run; by default the task's own.
        arms: some of ``none``, ``gradient``, ``regularized`` and ``update``, including ``none``.
        optimizers: names of the task's optimizers to use; all of them by default.
        jobs: number of worker processes, each with one torch thread. 1 runs in this process, with the current number of
            torch threads. Default: one per core on the CPU, 1 on an accelerator, all workers of a cluster.
        backend: ``"loky"`` for worker processes of this machine; ``"ray"`` or ``"dask"`` for those of a cluster.
        device: device to train on, in torch's notation.
        amp: train in mixed precision: bfloat16 if the device supports it, otherwise float16 with loss scaling.
        out: output folder; by default ``runs/`` and the task's name.
        resume: use the finished runs in ``out``; False moves them aside.
        progress: display the progress: bars on a terminal, elsewhere one line per run.

    Returns:
        The `Comparison`.

    Raises:
        TaskError: the task or an option is not usable.
        ResultsError: ``out`` holds runs of another task or files of somebody else, is in use, or cannot be written. If
            only the report could not be written, the error's ``comparison`` is the result.
        ArmError: a run did not train as its arm requires, or paired runs started differently.
        RunError: the task's own code raised an exception in a run.
    """
    options = {"seeds": seeds, "epochs": epochs, "arms": arms, "optimizers": optimizers, "device": device, "amp": amp}
    command = _command(task, options)
    start = Path.cwd()  # before the task's file, which may change it
    loaded = find_task(task)
    task = loaded.task
    settings, arms, seeds = _settings(task, options), _arms(arms), _seeds(seeds)
    known = ("custom",) if isinstance(task, CustomTask) else tuple(task.optimizers)
    optimizers = known if optimizers is None else _names("optimizers", optimizers, known)
    if jobs is not None:
        check_count("jobs", jobs)
    check_backend(backend)
    parts = fingerprint(loaded, settings, optimizers, arms)
    keys = [Key(optimizer, arm, seed) for seed in seeds for optimizer in optimizers for arm in arms]
    with Store(start / (Path("runs", task.name) if out is None else Path(out).expanduser())) as store:
        store.begin(parts, resume=resume)
        before = [store.runs[key] for key in keys if key in store.runs]
        missing = [key for key in keys if key not in store.runs]
        folder = store.folder
        probe = folder.path / PROBE
        if isinstance(task, Task) and missing and not (store.runs and probe.exists()):
            # This precedes the runs, so that it reports an error in the task early.
            write_probe(probe_task(task, device=device, amp=amp), folder, PROBE)
        display = Progress(keys, before, settings.epochs if settings else None, task.metric_name, progress)
        runs = run_all(loaded, missing, settings, jobs=jobs, backend=backend, out=folder, follower=display)
        with display, closing(runs):
            for run in runs:
                _check_paired(run, store.runs.values())
                store.add(run)
                display.finished(run)
        comparison = Comparison(
            task=task.name,
            metric=task.metric_name,
            higher_is_better=task.higher_is_better,
            arms=arms,
            optimizers=optimizers,
            seeds=seeds,
            all_runs=tuple(store.runs[key] for key in keys),
            checked=isinstance(task, Task),
            out=folder.path,
            command=command,
            fingerprint=store.fingerprint,
            probe=read_probe(probe),
        )
        try:
            write_report(comparison)
        except ResultsError as error:
            error.comparison = comparison
            raise
    return comparison


def _check_paired(run: Run, others: Iterable[Run]) -> None:
    """Raise an `ArmError` unless the runs of its seed started from the same weights and trained on the same batches."""
    for other in (other for other in others if other.seed == run.seed):
        starts = {"initial weights": (run.weights, other.weights)}
        for one, two in zip(run.epochs, other.epochs, strict=False):
            starts[f"batches of epoch {one['epoch']}"] = (one.get("data"), two.get("data"))
        for what, pair in starts.items():
            if None not in pair and pair[0] != pair[1]:
                raise ArmError(
                    f"runs of seed {run.seed} are not paired: ({run.key}) and ({other.key}) have different {what}; "
                    "the task must draw its random numbers from torch, NumPy or random, without setting a seed"
                )


def _arms(arms: Sequence[str]) -> tuple[str, ...]:
    chosen = _names("arms", arms, ARMS)
    if NONE not in chosen:
        raise TaskError(f"arms: {NONE!r} must be one of them, because the others are compared with it")
    if len(chosen) == 1:
        others = " or ".join(map(repr, DEFAULT_ARMS[1:]))
        raise TaskError(f"arms: {NONE!r} alone leaves nothing to compare; add {others}")
    return tuple(arm for arm in ARMS if arm in chosen)


def _names(field: str, chosen: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(chosen, str):
        raise TaskError(f"{field}: give a list of names, such as [{chosen!r}]")
    for name in chosen:
        if name not in known:
            raise TaskError(f"{field}: unknown {field.removesuffix('s')} {name!r}; choose from {', '.join(known)}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise TaskError(f"{field}: give at least one, each once; choose from {', '.join(known)}")
    return tuple(chosen)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int):
        check_seed_count(seeds)
        return tuple(range(seeds))
    valid = all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    if not seeds or not valid or len(set(seeds)) != len(seeds):
        raise TaskError(f"seeds: give a number of seeds, or different integers from 0 to 2**32 - 1, not {seeds!r}")
    return tuple(seeds)


def _settings(task: AnyTask, options: dict[str, Any]) -> Settings | None:
    if isinstance(task, CustomTask):
        for name in ("epochs", "optimizers", "device", "amp"):
            if options[name] != inspect.signature(compare).parameters[name].default:
                raise TaskError(f"{name}: a CustomTask has its own trainer; set it there")
        return None
    epochs = task.epochs if options["epochs"] is None else options["epochs"]
    check_count("epochs", epochs)
    check_device(options["device"], options["amp"])
    return Settings(epochs, options["device"], options["amp"])


def _command(task: object, options: dict[str, Any]) -> str:
    """Format the Python call that repeats the comparison, with a file's name in place of its path."""
    source = repr(Path(task).name) if isinstance(task, (str, Path)) else "task"
    defaults = inspect.signature(compare).parameters
    given = [f"{k}={v!r}" for k, v in options.items() if k == "seeds" or v != defaults[k].default]
    return f"gradcentral.compare({', '.join([source, *given])})"
