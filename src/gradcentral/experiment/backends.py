"""Where the workers of a comparison are: on this machine (loky), or wherever Ray or Dask has some."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from gradcentral.experiment.errors import TaskError
from gradcentral.extras import optional

__all__ = ["BACKENDS", "check_backend", "outcomes_of"]

BACKENDS = ("loky", "ray", "dask")


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or is not installed.

    Raises:
        TaskError: naming the choices.
        MissingExtraError: the package is missing; the message says how to install it.
    """
    if backend not in BACKENDS:
        raise TaskError(f"backend: there is no {backend!r}; there is {', '.join(BACKENDS)}")
    if backend != "loky":
        optional("distributed" if backend == "dask" else backend, extra=backend)


@contextmanager
def outcomes_of(calls: Iterable[Any], *, backend: str, jobs: int | None, device: str) -> Iterator[Iterator[Any]]:
    """The results of joblib's delayed calls as they come; leaving the block ends the workers.

    Args:
        calls: made with ``joblib.delayed``.
        backend: one of `BACKENDS`.
        jobs: how many at a time; None for as many as the cluster has workers.
        device: where each trains: on Ray, a run on CUDA asks for a GPU.
    """
    joblib = optional("joblib")
    with contextlib.ExitStack() as stack:
        if backend != "loky":
            stack.enter_context(_ray(jobs) if backend == "ray" else _dask(jobs))
        stack.enter_context(joblib.parallel_config(backend=backend, **_options(backend, device)))
        count = joblib.effective_n_jobs(-1) if jobs is None else jobs
        if backend == "ray":
            # joblib's Ray backend gives its results all at once; a round of them can be kept when it ends.
            parallel = stack.enter_context(joblib.Parallel(n_jobs=count, batch_size=1))
            yield _in_rounds(parallel, iter(calls), count)
            return
        parallel = joblib.Parallel(n_jobs=count, return_as="generator_unordered", batch_size=1)
        outcomes = parallel(calls)
        stack.callback(_cancel_quietly, outcomes)
        yield outcomes


def _options(backend: str, device: str) -> dict[str, Any]:
    if backend == "loky":
        return {"inner_max_num_threads": 1}
    return {"ray_remote_args": {"num_gpus": 1}} if backend == "ray" and torch.device(device).type == "cuda" else {}


def _in_rounds(parallel: Any, calls: Iterator[Any], count: int) -> Iterator[Any]:
    while some := [*islice(calls, count)]:
        yield from parallel(some)


def _cancel_quietly(outcomes: Generator[Any, None, None]) -> None:
    """End the workers; joblib would warn that runs under way are lost, but then they should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ tasks", UserWarning)
        outcomes.close()


@contextmanager
def _ray(jobs: int | None) -> Iterator[None]:
    """The Ray this process is connected to, else that of ``RAY_ADDRESS``, else one on this machine until the end."""
    ray = optional("ray", extra="ray")
    optional("ray.util.joblib", extra="ray").register_ray()
    if ray.is_initialized():
        yield
        return
    # A cluster has its own number of CPUs, and Ray refuses to be told another.
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
    ray.init(log_to_driver=False, **here)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(jobs: int | None) -> Iterator[None]:
    """The Dask client of this process, else one of ``DASK_SCHEDULER_ADDRESS``, else workers on this machine."""
    distributed = optional("distributed", extra="dask")
    try:
        distributed.default_client()
    except ValueError:
        there = optional("dask", extra="dask").config.get("scheduler-address", None)
        here = {} if there else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
        with distributed.Client(**here):
            yield
    else:
        yield
