"""Many runs: in this process, or spread over worker processes, here or on a cluster, by joblib."""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.backends import outcomes_of
from gradcentral.experiment.errors import ArmError, ExperimentError, RunError
from gradcentral.experiment.loading import Address, Parcel, TaskReference, describe, follow_address, open_parcel, where
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.task import CustomTask
from gradcentral.experiment.threads import one_thread
from gradcentral.experiment.training import Settings, follow, train
from gradcentral.extras import optional

__all__ = ["default_jobs", "run_all"]


@dataclass(frozen=True)
class Failure:
    """A run that raised, in a form that any process can read."""

    kind: type[ExperimentError]
    message: str
    trace: str


def run_all(
    reference: TaskReference,
    keys: Sequence[Key],
    settings: Settings | None,
    *,
    jobs: int | None,
    progress: Path,
    backend: str = "loky",
) -> Iterator[Run]:
    """Run them all and yield each as it finishes, in no particular order; on Ray in rounds of ``jobs``.

    Args:
        reference: the task.
        keys: what to run.
        settings: how to train; None for a `CustomTask`.
        jobs: worker processes, each with one torch thread; with loky, 1 runs in this process, with its threads. None,
            on a cluster: all its workers.
        progress: an existing file, to which one line an epoch is added; runs end when it is taken away. Workers of a
            cluster know nothing of it.
        backend: one of `BACKENDS`.

    Raises:
        RunError: the task raised in a run; the traceback is in ``error.txt`` beside ``progress``.
        ArmError: a run did not do what its arm says.
    """
    if jobs == 1 and backend == "loky":
        with preserve_state():
            for key in keys:
                yield _unwrap(_run(reference, key, settings, progress), progress.parent)
        return
    work = optional("joblib").delayed(_run_in_worker)
    device = "cpu" if settings is None else settings.device
    with tempfile.TemporaryDirectory(prefix="gradcentral-") as folder:
        # What another machine may not see travels along.
        here = backend == "loky"
        task, file = (reference.portable(Path(folder)), progress) if here else (reference.parcel(), None)
        calls = (work(task, key, settings, file) for key in keys)
        try:
            with outcomes_of(calls, backend=backend, jobs=jobs, device=device) as outcomes:
                for outcome in outcomes:
                    yield _unwrap(outcome, progress.parent)
        except ExperimentError:
            raise
        except Exception as error:  # TerminatedWorkerError, RayActorError, KilledWorker …
            raise RunError(
                f"a worker process died ({describe(error)}); with fewer jobs= each has more memory"
            ) from error


def default_jobs(device: str, runs: int) -> int:
    """The CPU's cores, at most one a run; 1 on an accelerator, whose runs would only compete."""
    if torch.device(device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs))


_one_at_a_time = threading.Lock()


def _run_in_worker(task: Address | Parcel, key: Key, settings: Settings | None, progress: Path | None) -> Run | Failure:
    # A Dask worker may have several threads, but torch has one stream of random numbers for all of them.
    # It may also be a thread of the caller's own process, whose random numbers and threads are not ours.
    with _one_at_a_time, preserve_state(), one_thread():
        try:
            reference = open_parcel(task) if isinstance(task, Parcel) else follow_address(task)
            return _run(reference, key, settings, progress)
        except ExperimentError as error:
            return Failure(type(error), str(error), traceback.format_exc())


def _run(reference: TaskReference, key: Key, settings: Settings | None, progress: Path | None) -> Run | Failure:
    def on_epoch(record: dict[str, Any]) -> None:
        if progress is None:
            return
        metric = record["test_metric"] if math.isfinite(record["test_metric"]) else None
        line = json.dumps([*key, record["epoch"], metric]) + "\n"
        # Not created anew: where it is gone the comparison has ended, and this run is nobody's.
        file = os.open(progress, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    try:
        task = reference.task
        if isinstance(task, CustomTask):
            return follow(task, key, on_epoch)
        assert settings is not None
        return train(task, key, settings, on_epoch)
    except Exception as error:
        kind = type(error) if isinstance(error, ExperimentError) else RunError
        place = "" if isinstance(error, ExperimentError) else f" ({where(error, reference.source)})"
        return Failure(kind, f"run {key}: {describe(error)}{place}", traceback.format_exc())


def _unwrap(outcome: Run | Failure, folder: Path) -> Run:
    if isinstance(outcome, Run):
        return outcome
    path = folder / "error.txt"
    path.write_text(outcome.trace, encoding="utf-8")
    hint = "" if outcome.kind is ArmError else f"; the traceback is in {path}"
    raise outcome.kind(outcome.message + hint)
