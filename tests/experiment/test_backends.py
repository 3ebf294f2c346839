"""Workers elsewhere: what travels to them, and the same runs whoever does them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradcentral.experiment import Comparison, RunError, Task, TaskError, backends
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.loading import open_parcel, refer_to
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
    monkeypatch.setattr("gradcentral.experiment.report.write_report", lambda comparison: None)


def _numbers(result: Comparison) -> list[Any]:
    return [(run.key, run.epochs, run.train_metric, run.weights) for run in result.records]


# What travels.


def test_a_file_that_is_not_there_is_loaded_from_the_parcel(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    parcel = refer_to(path).parcel()
    path.unlink()
    opened = open_parcel(parcel)
    assert opened.task.name == "mine"
    assert opened.source is not None
    assert opened.source.name == "mine.py"
    assert open_parcel(parcel) is opened


def test_a_file_that_is_there_is_loaded_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text(SOURCE)
    assert open_parcel(refer_to(path).parcel()).source == path


def test_a_file_that_changed_before_it_was_sent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text(SOURCE)
    reference = refer_to(path)
    path.write_text(SOURCE + "\n# and more\n")
    with pytest.raises(TaskError, match="changed while its runs were going on"):
        open_parcel(reference.parcel())


def test_tasks_from_memory_and_built_in_ones_travel(tiny: Callable[..., Task]) -> None:
    task = tiny()
    opened = open_parcel(refer_to(task).parcel()).task
    assert isinstance(opened, Task)
    assert opened is not task
    assert all(torch.equal(one, other) for one, other in zip(opened.train[7], task.train[7], strict=True))
    assert open_parcel(refer_to("digits").parcel()).task.name == "digits"


# What is refused.


def test_an_unknown_backend_is_named(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="backend: there is no 'slurm'; there is loky, ray, dask"):
        compare(tiny(), backend="slurm", out=tmp_path)


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_package_is_asked_for(
    tiny: Callable[..., Task], tmp_path: Path, backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"this needs {package}: pip install 'gradcentral\[{backend}\]'"):
        compare(tiny(), backend=backend, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_rounds_hold_as_many_runs_as_there_are_workers() -> None:
    rounds: list[list[int]] = []

    def parallel(calls: list[int]) -> list[int]:
        rounds.append(calls)
        return calls

    assert [*backends._in_rounds(parallel, iter(range(5)), 2)] == [0, 1, 2, 3, 4]
    assert rounds == [[0, 1], [2, 3], [4]]


def test_a_run_on_cuda_asks_ray_for_a_gpu() -> None:
    assert backends._options("ray", "cuda:0") == {"ray_remote_args": {"num_gpus": 1}}
    assert backends._options("ray", "cpu") == backends._options("dask", "cuda") == {}


# On a Ray and a Dask of this machine.

CLUSTERS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                importlib.util.find_spec(package) is None,
                reason=f"needs {package}: pip install 'gradcentral[{name}]' (make cluster does)",
            ),
            pytest.mark.filterwarnings("ignore"),  # Ray and Dask warn of sockets, forks and each other
        ],
    )
    for name, package in (("ray", "ray"), ("dask", "distributed"))
]


@pytest.mark.parametrize("backend", CLUSTERS)
def test_without_a_cluster_there_is_one_here_until_the_end(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    result = compare(path, seeds=1, jobs=1, backend=backend, out=tmp_path / "out")
    assert len(result.records) == 3
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
    if request.param == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield "ray"
        ray.shutdown()
    else:
        import distributed

        # One worker of two threads: two runs in one process must not share their random numbers.
        with distributed.Client(n_workers=1, threads_per_worker=2, dashboard_address=None):
            yield "dask"


on_each_cluster = pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)


@on_each_cluster
def test_runs_are_the_same_on_a_cluster(cluster: str, tiny: Callable[..., Task], tmp_path: Path) -> None:
    here = compare(tiny(), seeds=2, jobs=1, out=tmp_path / "here")
    there = compare(tiny(), seeds=2, jobs=2, backend=cluster, out=tmp_path / "there")
    assert _numbers(there) == _numbers(here)


@on_each_cluster
def test_a_file_of_ones_own_runs_on_a_cluster(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    result = compare(path, seeds=2, backend=cluster, out=tmp_path / "out")
    assert [run.final("test_metric") for run in result.records] == [4, 8, 6, 5, 9, 7]


@on_each_cluster
def test_an_interrupted_comparison_goes_on_from_what_was_finished(
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
    assert len(result.records) == len((tmp_path / RESULTS).read_text().splitlines()) == 6


@on_each_cluster
def test_an_exception_on_a_cluster_is_one_line(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def task(seed, arm):\n    raise ValueError('no such thing')\n")
    with pytest.raises(RunError, match=r"run custom, .*ValueError: no such thing \(.*broken\.py, line 2\)"):
        compare(path, seeds=1, jobs=2, backend=cluster, out=tmp_path / "out")
