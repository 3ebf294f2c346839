"""Train many runs, in this process or in worker processes of this machine or a cluster, through joblib."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.determinism import one_thread
from gradcentral.experiment.errors import ExperimentError, ResultsError, RunError, TaskError, line_of, one_line
from gradcentral.experiment.loading import LoadedTask, PackedTask, unpack
from gradcentral.experiment.orphans import end_with_parent
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.store import ERROR, Key, Run
from gradcentral.experiment.training import Settings, train
from gradcentral.extras import MissingExtraError, optional

__all__ = ["check_backend", "default_jobs", "run_all"]

# Backend -> its package and the extra that installs it.
BACKENDS = {"loky": ("joblib", "experiments"), "ray": ("ray", "ray"), "dask": ("distributed", "dask")}

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


class Follower(Protocol):
    """What follows the epochs of runs: it is called for those in this process, and reads the file of the others."""

    def epoch(self, key: Key, epoch: int) -> None:
        """Receive the end of an epoch of a run in this process."""

    def follow(self, path: Path) -> None:
        """Read the epochs of runs in worker processes from a file: per line, a JSON list of the key and the epoch."""


def run_all(
    loaded: LoadedTask,
    keys: Sequence[Key],
    settings: Settings | None,
    *,
    jobs: int | None,
    backend: str,
    out: OutputFolder,
    follower: Follower,
) -> Generator[Run, None, None]:
    """Train all runs and yield each when it finishes, in no particular order; on Ray in rounds of ``jobs``.

    Runs in this process change the global random number generators. Workers of this machine read the task from a
    temporary folder, and end when this process does. The traceback of a run that raised an exception is written to
    ``error.txt`` in ``out``.
    """
    if not keys:
        return
    device = "cpu" if settings is None else settings.device
    if backend == "loky":
        jobs = jobs or default_jobs(device, len(keys))
        if jobs == 1:
            for key in keys:
                yield _run_or_raise(_run(loaded, key, settings, partial(follower.epoch, key)), out)
            return
    with _shared_folder(backend) as shared:
        if shared is not None:
            follower.follow(shared.epochs)
        try:
            packed = loaded.pack(shared and shared.path)
            calls = (optional("joblib").delayed(_run_in_worker)(packed, key, settings, shared) for key in keys)
            with _outcomes(calls, backend, jobs and min(jobs, len(keys)), device) as outcomes:
                for outcome in outcomes:
                    yield _run_or_raise(outcome, out)
        except (ExperimentError, MissingExtraError):
            raise
        except OSError as error:  # no disk or memory for the task, queues and semaphores
            raise RunError(f"the worker processes cannot be used ({one_line(error)}); use jobs=1") from error
        except Exception as error:  # joblib's TerminatedWorkerError, Ray's RayActorError, Dask's KilledWorker …
            raise RunError(
                f"a worker process died ({one_line(error)}); with fewer jobs= each has more memory"
            ) from error


class _Shared(NamedTuple):
    """A temporary folder that the workers of this machine share, and the process that started them."""

    path: Path
    parent: int

    @property
    def epochs(self) -> Path:
        return self.path / "epochs.jsonl"


@contextmanager
def _shared_folder(backend: str) -> Iterator[_Shared | None]:
    """Create the folder for workers of this machine; None on a cluster. It is removed after the workers have ended."""
    if backend != "loky":
        yield None
        return
    try:
        folder = TemporaryDirectory(prefix="gradcentral-", ignore_cleanup_errors=True)
    except OSError as error:
        raise RunError(f"no temporary folder can be created ({one_line(error)}); use jobs=1") from error
    with folder as path:
        shared = _Shared(Path(path), os.getpid())
        shared.epochs.touch()
        yield shared


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


def _run_in_worker(task: PackedTask, key: Key, settings: Settings | None, shared: _Shared | None) -> Result:
    if shared is not None:
        end_with_parent(shared.parent, shared.path)
        # The method that loky sets in its workers cannot start the workers of a DataLoader; None is the platform's.
        multiprocessing.set_start_method(None, force=True)
    on_epoch = partial(_append_epoch, shared and shared.epochs, key)
    with _one_at_a_time, preserve_state(), one_thread():
        return _run(task, key, settings, on_epoch)


def _append_epoch(path: Path | None, key: Key, epoch: int) -> None:
    if path is None:  # on a cluster
        return
    try:
        # Open without creating: if the file is gone, the comparison was cancelled and this run should fail.
        with open(path, "a", opener=lambda path, flags: os.open(path, flags & ~os.O_CREAT)) as file:
            file.write(json.dumps([*key, epoch]) + "\n")
    except FileNotFoundError:
        raise
    except OSError:
        pass  # a full disk stops the progress bars, not the run


def _run(task: LoadedTask | PackedTask, key: Key, settings: Settings | None, on_epoch: Callable[[int], None]) -> Result:
    """Train and return the run, or an error that can be unpickled without the task's code."""
    try:
        loaded = unpack(task) if isinstance(task, PackedTask) else task
        return train(loaded.task, key, settings, on_epoch)
    except (Exception, SystemExit) as error:  # sys.exit in a task's code must not end this program
        failure: ExperimentError = RunError(f"run {key}: {one_line(error)} ({line_of(error, task.file)})")
        if isinstance(error, ExperimentError):
            failure = type(error)(f"run {key}: {one_line(error)}")
        failure.trace = traceback.format_exc()
        return failure


def _run_or_raise(outcome: Result, folder: OutputFolder) -> Run:
    if isinstance(outcome, Run):
        return outcome
    try:
        folder.claim([ERROR])
        path = folder.write(ERROR, outcome.trace)
    except ResultsError:  # the error of the run is more important
        raise outcome from None
    raise type(outcome)(f"{outcome}; the traceback is in {path}")
