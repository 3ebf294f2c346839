"""Workers in other processes and on clusters: packed tasks, and bit-identical runs on every backend."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcentral.experiment import Comparison, CustomTask, RunError, Task, TaskError, workers
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.loading import find_task, unpack
from gradcentral.experiment.store import RESULTS, Run, Store
from gradcentral.extras import MissingExtraError

compare = functools.partial(compare_loudly, progress=False)

SOURCE = """
def run(seed, arm):
    yield {"train_loss": 0.5, "test_metric": seed + len(arm)}

task = run
"""


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)


def _numbers(result: Comparison) -> list[Any]:
    return [(run.key, run.epochs, run.train_metric, run.weights) for run in result.all_runs]


# Packing tasks.


def test_a_packed_file_is_loaded_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    packed = find_task(path).pack(None)
    path.unlink()
    unpacked = unpack(packed)
    assert unpacked.task.name == "mine"
    assert unpacked.file == path
    assert unpack(packed) is unpacked


def test_a_packed_file_is_loaded_beside_its_modules(tmp_path: Path) -> None:
    (tmp_path / "module_beside.py").write_text("NAME = 'beside'\n")
    path = tmp_path / "other.py"
    path.write_text("import module_beside\n" + SOURCE.replace("seed + len(arm)", "len(module_beside.NAME)"))
    task = unpack(find_task(path).pack(None)).task
    assert isinstance(task, CustomTask)
    assert next(iter(task.run(0, "none")))["test_metric"] == 6


def test_workers_run_a_file_as_it_was_loaded_even_if_it_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text(SOURCE)
    loaded = find_task(path)
    path.write_text(SOURCE.replace("0.5", "0.7"))
    task = unpack(loaded.pack(None)).task
    assert isinstance(task, CustomTask)
    assert next(iter(task.run(0, "none")))["train_loss"] == 0.5


@pytest.mark.parametrize("shared", [True, False])
def test_tasks_from_memory_and_built_in_ones_are_packed(
    tiny: Callable[..., Task], tmp_path: Path, shared: bool
) -> None:
    folder = tmp_path if shared else None
    task = tiny()
    unpacked = unpack(find_task(task).pack(folder)).task
    assert isinstance(unpacked, Task)
    assert unpacked is not task
    assert all(torch.equal(one, other) for one, other in zip(unpacked.train[7], task.train[7], strict=True))
    assert unpack(find_task("digits").pack(folder)).task.name == "digits"


def test_a_task_that_cannot_be_pickled_runs_with_the_suggested_jobs(tiny: Callable[..., Task], tmp_path: Path) -> None:
    lock = threading.Lock()  # cannot be pickled
    task = tiny(model=lambda: nn.Linear(6, 2) if lock else None)
    with pytest.raises(TaskError, match="put it in a file and pass its path, or use jobs=1") as caught:
        compare(task, seeds=1, jobs=2, out=tmp_path)
    jobs = int(str(caught.value).rpartition("jobs=")[2])
    assert len(compare(task, seeds=1, jobs=jobs, out=tmp_path).all_runs) == 3


DIES = """
import os

def task(seed, arm):
    if os.getpid() != PARENT:
        os._exit(1)
    yield {"train_loss": 0.5, "test_metric": 1}
"""


def test_a_dead_worker_is_reported_and_fewer_jobs_can_help(tmp_path: Path) -> None:
    path = tmp_path / "dies.py"
    path.write_text(f"PARENT = {os.getpid()}\n{DIES}")  # not in the environment: workers may be reused
    with pytest.raises(RunError, match="a worker process died .*with fewer jobs="):
        compare(path, seeds=1, jobs=2, out=tmp_path / "out")
    assert len(compare(path, seeds=1, jobs=1, out=tmp_path / "out").all_runs) == 3


# Refusals.


def test_an_unknown_backend_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="backend: unknown backend 'slurm'; choose from loky, ray, dask"):
        compare(tiny(), backend="slurm", out=tmp_path)


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_the_error_of_a_missing_package_names_the_extra(
    tiny: Callable[..., Task], tmp_path: Path, backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed: pip install 'gradcentral\[{backend}\]'"):
        compare(tiny(), backend=backend, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_rounds_hold_as_many_runs_as_there_are_workers() -> None:
    rounds: list[list[int]] = []

    def parallel(calls: list[int]) -> list[int]:
        rounds.append(calls)
        return calls

    assert [*workers._in_rounds(parallel, iter(range(5)), 2)] == [0, 1, 2, 3, 4]
    assert rounds == [[0, 1], [2, 3], [4]]


def test_a_run_on_cuda_requests_a_gpu_from_ray() -> None:
    assert workers._options("ray", "cuda:0") == {"ray_remote_args": {"num_gpus": 1}}
    assert workers._options("ray", "cpu") == workers._options("dask", "cuda") == {}


# Ray and Dask on this machine.

CLUSTERS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                importlib.util.find_spec(package) is None,
                reason=f"needs {package}: pip install 'gradcentral[{name}]' (make cluster does)",
            ),
            pytest.mark.filterwarnings("ignore"),  # Ray and Dask warn about sockets, forks and each other
        ],
    )
    for name, package in (("ray", "ray"), ("dask", "distributed"))
]


@pytest.mark.parametrize("backend", CLUSTERS)
def test_without_a_cluster_a_local_one_is_started_and_stopped(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    result = compare(path, seeds=1, jobs=1, backend=backend, out=tmp_path / "out")
    assert len(result.all_runs) == 3
    if backend == "ray":
        import ray

        assert not ray.is_initialized()
    else:
        import distributed

        with pytest.raises(ValueError, match="No client"):
            distributed.default_client()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """A cluster of two workers that lasts for several comparisons."""
    if request.param == "loky":
        yield "loky"
    elif request.param == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield "ray"
        ray.shutdown()
    else:
        import distributed

        # One worker with two threads: two runs in one process must not share random numbers.
        with distributed.Client(n_workers=1, threads_per_worker=2, dashboard_address=None):
            yield "dask"


on_each_cluster = pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)


@on_each_cluster
def test_runs_on_a_cluster_are_bit_identical(cluster: str, tiny: Callable[..., Task], tmp_path: Path) -> None:
    local = compare(tiny(), seeds=2, jobs=1, out=tmp_path / "here")
    remote = compare(tiny(), seeds=2, jobs=2, backend=cluster, out=tmp_path / "there")
    assert _numbers(remote) == _numbers(local)


@on_each_cluster
def test_a_users_file_runs_on_a_cluster(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    result = compare(path, seeds=2, backend=cluster, out=tmp_path / "out")
    assert [run.final("test_metric") for run in result.all_runs] == [4, 8, 6, 5, 9, 7]


@pytest.mark.parametrize("cluster", ["loky", *CLUSTERS], indirect=True)
def test_an_interrupted_comparison_continues_with_the_missing_runs(
    cluster: str, tiny: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Store.add

    def interrupted(self: Store, run: Run) -> None:
        add(self, run)
        if len(self.runs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(tiny(), seeds=2, jobs=2, backend=cluster, out=tmp_path)
    kept = (tmp_path / RESULTS).read_text().splitlines()
    assert len(kept) == 3
    result = compare(tiny(), seeds=2, jobs=2, backend=cluster, out=tmp_path)
    assert (tmp_path / RESULTS).read_text().splitlines()[:3] == kept
    assert len(result.all_runs) == len((tmp_path / RESULTS).read_text().splitlines()) == 6


@on_each_cluster
def test_the_error_of_a_run_on_a_cluster_is_one_line(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def task(seed, arm):\n    raise ValueError('no such thing')\n")
    with pytest.raises(RunError, match=r"run custom, .*ValueError: no such thing \(.*broken\.py, line 2\)"):
        compare(path, seeds=1, jobs=2, backend=cluster, out=tmp_path / "out")
