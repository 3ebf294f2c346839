"""Many runs: in this process, or on worker processes of this machine or a cluster, through joblib."""

from __future__ import annotations

import json
import os
import threading
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.determinism import one_thread
from gradcentral.experiment.errors import ArmError, ExperimentError, RunError, TaskError, line_of, one_line
from gradcentral.experiment.loading import LoadedTask, PackedTask, unpack
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.training import Settings, train
from gradcentral.extras import optional

__all__ = ["BACKENDS", "EPOCHS", "check_backend", "default_jobs", "run_all"]

BACKENDS = ("loky", "ray", "dask")
EPOCHS = "epochs.jsonl"


@dataclass(frozen=True)
class Failure:
    """A run that raised, in a form that can be unpickled without the task's code."""

    kind: type[ExperimentError]
    message: str
    trace: str


def check_backend(backend: str) -> None:
    """Check that a backend exists and is installed.

    Raises:
        TaskError: the backend is unknown; the message lists the known ones.
        MissingExtraError: its package is missing; the message has the command that installs it.
    """
    if backend not in BACKENDS:
        raise TaskError(f"backend: unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if backend != "loky":
        optional("distributed" if backend == "dask" else backend, extra=backend)


def default_jobs(device: str, runs: int) -> int:
    """Return the number of CPU cores, at most one per run; 1 on an accelerator, where runs would only compete."""
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
    """Run them all and yield each when it finishes, in no particular order; on Ray in rounds of ``jobs``.

    Runs in this process change the global random number generators.

    Args:
        loaded: the task.
        keys: which runs.
        settings: how to train; None for a `CustomTask`.
        jobs: see `compare`.
        backend: one of `BACKENDS`.
        out: the folder for ``error.txt``, the traceback of a run that raised an exception.
        scratch: a temporary folder. Workers of this machine read the task from it, append a line per epoch to its
            `EPOCHS`, and end with an error once it is removed.

    Raises:
        RunError: the task's code raised an exception in a run.
        ArmError: a run did not train as its arm requires.
    """
    if not keys:
        return
    device = "cpu" if settings is None else settings.device
    local = backend == "loky"
    epochs_file = scratch / EPOCHS if local else None
    if epochs_file is not None:
        epochs_file.touch()
        jobs = default_jobs(device, len(keys)) if jobs is None else jobs
    if jobs == 1 and local:
        for key in keys:
            yield _run_or_raise(_run(loaded, key, settings, epochs_file), out)
        return
    packed = loaded.pack(scratch if local else None)
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
    """Yield the results of joblib's delayed calls as they are made; leaving the block ends the workers."""
    joblib = optional("joblib")
    with ExitStack() as stack:
        if backend != "loky":
            stack.enter_context(_ray(jobs) if backend == "ray" else _dask(jobs))
        stack.enter_context(joblib.parallel_config(backend=backend, **_options(backend, device)))
        count = joblib.effective_n_jobs(-1) if jobs is None else jobs
        if backend == "ray":
            # joblib's Ray backend returns all results at once. In rounds, those of finished rounds can be stored.
            parallel = stack.enter_context(joblib.Parallel(n_jobs=count, batch_size=1))
            yield _in_rounds(parallel, calls, count)
            return
        outcomes = joblib.Parallel(n_jobs=count, return_as="generator_unordered", batch_size=1)(calls)
        stack.callback(_cancel, outcomes)
        yield outcomes


def _options(backend: str, device: str) -> dict[str, Any]:
    if backend == "loky":
        return {"inner_max_num_threads": 1}
    return {"ray_remote_args": {"num_gpus": 1}} if backend == "ray" and torch.device(device).type == "cuda" else {}


def _in_rounds(parallel: Any, calls: Iterator[Any], count: int) -> Iterator[Any]:
    while some := [*islice(calls, count)]:
        yield from parallel(some)


def _cancel(outcomes: Any) -> None:
    """End the workers, without joblib's warning that their unfinished runs are lost: that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ tasks", UserWarning)
        outcomes.close()


@contextmanager
def _ray(jobs: int | None) -> Iterator[None]:
    """Use Ray as it is initialized, else the cluster at ``RAY_ADDRESS``, else start it here until the block ends."""
    ray = optional("ray", extra="ray")
    optional("ray.util.joblib", extra="ray").register_ray()
    if ray.is_initialized():
        yield
        return
    # Ray does not accept a number of CPUs for an existing cluster.
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
    ray.init(log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(jobs: int | None) -> Iterator[None]:
    """Use the current Dask client, else one of ``DASK_SCHEDULER_ADDRESS``, else start workers here."""
    distributed = optional("distributed", extra="dask")
    try:
        distributed.default_client()
    except ValueError:
        address = optional("dask", extra="dask").config.get("scheduler-address", None)
        local = {} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
        with distributed.Client(**local):
            yield
    else:
        yield


# A Dask worker may have several threads, but torch has one generator of random numbers for all of them. It may also be
# a thread of the caller's own process, whose random numbers and number of threads must not change.
_one_at_a_time = threading.Lock()


def _run_in_worker(packed: PackedTask, key: Key, settings: Settings | None, epochs_file: Path | None) -> Run | Failure:
    with _one_at_a_time, preserve_state(), one_thread():
        try:
            return _run(unpack(packed), key, settings, epochs_file)
        except ExperimentError as error:
            return Failure(type(error), str(error), traceback.format_exc())


def _run(loaded: LoadedTask, key: Key, settings: Settings | None, epochs_file: Path | None) -> Run | Failure:
    def on_epoch(epoch: dict[str, Any]) -> None:
        if epochs_file is not None:
            # Open without creating: if the file is gone, the comparison was cancelled and this run should fail.
            file = os.open(epochs_file, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, (json.dumps([*key, epoch["epoch"]]) + "\n").encode())
            finally:
                os.close(file)

    try:
        return train(loaded.task, key, settings, on_epoch)
    except Exception as error:
        message, trace = f"run {key}: {one_line(error)}", traceback.format_exc()
        if isinstance(error, ExperimentError):
            return Failure(type(error), message, trace)
        return Failure(RunError, f"{message} ({line_of(error, loaded.file)})", trace)


def _run_or_raise(outcome: Run | Failure, folder: Path) -> Run:
    if isinstance(outcome, Run):
        return outcome
    path = folder / "error.txt"
    path.write_text(outcome.trace, encoding="utf-8")
    hint = "" if outcome.kind is ArmError else f"; the traceback is in {path}"
    raise outcome.kind(outcome.message + hint)
