"""Train many runs, in this process or in worker processes of this machine or a cluster, through joblib."""

from __future__ import annotations

import json
import os
import threading
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.determinism import one_thread
from gradcentral.experiment.errors import ExperimentError, RunError, TaskError, line_of, one_line
from gradcentral.experiment.loading import LoadedTask, PackedTask, unpack
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.training import Settings, train
from gradcentral.extras import optional

__all__ = ["EPOCHS", "check_backend", "default_jobs", "run_all"]

# Backend -> its package and the extra that installs it.
BACKENDS = {"loky": ("joblib", "experiments"), "ray": ("ray", "ray"), "dask": ("distributed", "dask")}
EPOCHS = "epochs.jsonl"

Result = Run | ExperimentError


def check_backend(backend: str) -> None:
    """Raise a `TaskError` if a backend is unknown, or a `MissingExtraError` if its package is missing."""
    if backend not in BACKENDS:
        raise TaskError(f"backend: unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    optional(*BACKENDS[backend])


def default_jobs(device: str, runs: int) -> int:
    """Return the number of CPU cores, at most one per run; 1 on an accelerator, where runs would compete."""
    if torch.device(device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs))


def run_all(
    loaded: LoadedTask,
    keys: Sequence[Key],
    settings: Settings | None,
    *,
    jobs: int | None,
    backend: str,
    out: Path,
    scratch: Path,
) -> Generator[Run, None, None]:
    """Train all runs and yield each when it finishes, in no particular order; on Ray in rounds of ``jobs``.

    Runs in this process change the global random number generators. Workers of this machine read the task from the
    temporary folder ``scratch``, append a line per epoch to its `EPOCHS`, and end with an error once it is removed.
    The traceback of a run that raised an exception is written to ``error.txt`` in ``out``.
    """
    if not keys:
        return
    device = "cpu" if settings is None else settings.device
    epochs_file = None
    if backend == "loky":
        (epochs_file := scratch / EPOCHS).touch()
        jobs = jobs or default_jobs(device, len(keys))
        if jobs == 1:
            for key in keys:
                yield _run_or_raise(_run(loaded, key, settings, epochs_file), out)
            return
    packed = loaded.pack(scratch if backend == "loky" else None)
    calls = (optional("joblib").delayed(_run_in_worker)(packed, key, settings, epochs_file) for key in keys)
    try:
        with _outcomes(calls, backend, jobs and min(jobs, len(keys)), device) as outcomes:
            for outcome in outcomes:
                yield _run_or_raise(outcome, out)
    except ExperimentError:
        raise
    except Exception as error:  # joblib's TerminatedWorkerError, Ray's RayActorError, Dask's KilledWorker …
        raise RunError(f"a worker process died ({one_line(error)}); with fewer jobs= each has more memory") from error


@contextmanager
def _outcomes(calls: Iterator[Any], backend: str, jobs: int | None, device: str) -> Iterator[Iterator[Any]]:
    """Yield an iterator over the results of joblib's delayed calls; leaving the block ends the workers."""
    joblib = optional("joblib")
    clusters: dict[str, Any] = {"loky": nullcontext, "ray": _ray, "dask": _dask}
    with clusters[backend](jobs), joblib.parallel_config(backend=backend, **_options(backend, device)):
        count = joblib.effective_n_jobs(-1) if jobs is None else jobs
        if backend == "ray":
            # joblib's Ray backend returns all results at once; with rounds, finished rounds can be stored.
            with joblib.Parallel(n_jobs=count, batch_size=1) as parallel:
                yield _in_rounds(parallel, calls, count)
            return
        outcomes = joblib.Parallel(n_jobs=count, return_as="generator_unordered", batch_size=1)(calls)
        try:
            yield outcomes
        finally:
            with warnings.catch_warnings():
                # Unfinished runs are meant to be lost when the workers end.
                warnings.filterwarnings("ignore", "[0-9]+ tasks", UserWarning)
                outcomes.close()


def _options(backend: str, device: str) -> dict[str, Any]:
    if backend == "loky":
        return {"inner_max_num_threads": 1}
    return {"ray_remote_args": {"num_gpus": 1}} if backend == "ray" and torch.device(device).type == "cuda" else {}


def _in_rounds(parallel: Any, calls: Iterator[Any], count: int) -> Iterator[Any]:
    while some := [*islice(calls, count)]:
        yield from parallel(some)


def _ray(jobs: int | None) -> Any:
    """Use Ray if it is initialized, or the cluster at ``RAY_ADDRESS``, or start Ray here until the block ends."""
    ray = optional("ray", extra="ray")
    optional("ray.util.joblib", extra="ray").register_ray()
    # Ray does not accept a number of CPUs for an existing cluster.
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
    return nullcontext() if ray.is_initialized() else ray.init(log_to_driver=False, **local)


def _dask(jobs: int | None) -> Any:
    """Use the current Dask client, or one for ``DASK_SCHEDULER_ADDRESS``, or start workers here."""
    distributed = optional("distributed", extra="dask")
    try:
        return nullcontext(distributed.default_client())
    except ValueError:
        address = optional("dask", extra="dask").config.get("scheduler-address", None)
        local = {} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
        return distributed.Client(**local)


# A Dask worker may have several threads, which share torch's random number generator. It may also be a thread of the
# caller's process, whose random numbers and number of threads must not change.
_one_at_a_time = threading.Lock()


def _run_in_worker(task: PackedTask, key: Key, settings: Settings | None, epochs_file: Path | None) -> Result:
    with _one_at_a_time, preserve_state(), one_thread():
        return _run(task, key, settings, epochs_file)


def _run(task: LoadedTask | PackedTask, key: Key, settings: Settings | None, epochs_file: Path | None) -> Result:
    """Train and return the run, or an error that can be unpickled without the task's code."""

    def on_epoch(epoch: int) -> None:
        if epochs_file is not None:
            # Open without creating: if the file is gone, the comparison was cancelled and this run should fail.
            with open(epochs_file, "a", opener=lambda path, flags: os.open(path, flags & ~os.O_CREAT)) as file:
                file.write(json.dumps([*key, epoch]) + "\n")

    try:
        loaded = unpack(task) if isinstance(task, PackedTask) else task
        return train(loaded.task, key, settings, on_epoch)
    except (Exception, SystemExit) as error:  # sys.exit in a task's code must not end this program
        failure: ExperimentError = RunError(f"run {key}: {one_line(error)} ({line_of(error, task.file)})")
        if isinstance(error, ExperimentError):
            failure = type(error)(f"run {key}: {one_line(error)}")
        failure.trace = traceback.format_exc()
        return failure


def _run_or_raise(outcome: Result, folder: Path) -> Run:
    if isinstance(outcome, Run):
        return outcome
    path = folder / "error.txt"
    path.write_text(outcome.trace, encoding="utf-8", errors="backslashreplace")  # paths may hold surrogates
    raise type(outcome)(f"{outcome}; the traceback is in {path}")
