"""The fingerprint: runs of a changed task are never mixed with those of the original, wherever the change is."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradcentral.experiment import ResultsError, Task, TaskError
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.store import FINGERPRINT, RESULTS

compare = functools.partial(compare_loudly, progress=False, seeds=1, jobs=1)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)


def halve_late(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps - 1], gamma=0.5)


def doubled(examples: list[Any]) -> Any:
    inputs, targets = torch.utils.data.default_collate(examples)
    return 2 * inputs, targets


def other_data(examples: int) -> TensorDataset:
    return TensorDataset(torch.rand(examples, 6), torch.rand(examples, 2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size (was 16, is 8)"),
        ({"epochs": 3}, "epochs (was 2, is 3)"),
        ({"train": other_data(40)}, "train (was 40 examples"),
        ({"test": other_data(20)}, "test (was 20 examples"),
        ({"model": lambda: nn.Linear(6, 2)}, "model (was Sequential of 74 parameters"),
        (
            {"optimizers": {"sgd": lambda p: torch.optim.SGD(p, lr=0.2)}},
            "optimizers['sgd'] (was SGD(lr=0.1, momentum=0.9",
        ),
        ({"loss": nn.functional.l1_loss}, "untrained model: test loss, metric (was ≈ 0."),
        (
            {"loss": lambda output, target: 100 * nn.functional.mse_loss(output, target)},
            "two steps of sgd: losses, change of the weights (was ≈ 0.",
        ),
        ({"metric": lambda output, target: (output - target).abs().max()}, "metric (was mean_absolute_error"),
        ({"schedule": warm_up}, "schedule of sgd (was none, is LinearLR"),
        ({"schedule": halve_late}, "schedule of sgd (was none, is MultiStepLR"),
        ({"higher_is_better": True}, "higher_is_better (was False, is True)"),
        ({"drop_last": True}, "drop_last (was False, is True)"),
        ({"metric_per_batch": True}, "metric_per_batch (was False, is True)"),
        ({"collate": doubled}, "untrained model: test loss, metric (was ≈ 0."),
        ({"name": "other"}, "task (was tiny, is other)"),
    ],
)
def test_a_changed_task_is_refused_and_the_change_is_named(
    tiny: Callable[..., Task], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    compare(tiny(), arms=["none", "gradient"], out=tmp_path)
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(ResultsError) as caught:
        compare(tiny(**change), out=tmp_path)
    assert named in str(caught.value)
    assert "another --out" in str(caught.value)
    assert "--no-resume" in str(caught.value)
    assert (tmp_path / RESULTS).read_bytes() == before


def test_a_schedule_that_differs_only_late_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def same_until_late(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps - 1], gamma=0.4)

    compare(tiny(schedule=halve_late), out=tmp_path)
    with pytest.raises(ResultsError, match="Changed: schedule of sgd"):
        compare(tiny(schedule=same_until_late), out=tmp_path)


TASK = """
import torch
from torch.utils.data import TensorDataset
from {parts} import Net, criterion, score
from gradcentral.experiment import Task
x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
task = Task(name="t", model=Net, train=TensorDataset(x[:20], x[:20, :2]), test=TensorDataset(x[20:], x[20:, :2]),
    loss=criterion, metric=score, optimizers={{"sgd": lambda p: torch.optim.SGD(p, lr=.05)}}, batch_size=10, epochs=1)
"""
PARTS = """
import torch
from torch import nn
SCALE = 1.0
def activate(x): return torch.relu(x) * SCALE
class Net(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(6, 8); self.b = nn.Linear(8, 2)
    def forward(self, x): return self.b(activate(self.a(x)))
def inner(o, y): return nn.functional.mse_loss(o, y)
def criterion(o, y): return inner(o, y)
def judge(o, y): return nn.functional.l1_loss(o, y)
def score(o, y): return judge(o, y)
"""


@pytest.mark.parametrize(
    ("number", "old", "new"),
    [
        (1, "SCALE = 1.0", "SCALE = 0.5"),
        (2, "def inner(o, y): return ", "def inner(o, y): return 100 * "),
        (3, "def judge(o, y): return ", "def judge(o, y): return 2 * "),
        (4, "torch.relu(x)", "(torch.relu(x) if self_training else x)"),
    ],
)
def test_a_change_in_an_imported_module_is_refused(tmp_path: Path, number: int, old: str, new: str) -> None:
    """Each call is a process of its own, as on the command line."""
    (tmp_path / "mine.py").write_text(TASK.format(parts=f"parts_{number}"))
    parts = tmp_path / f"parts_{number}.py"
    code = (
        "from gradcentral.experiment import compare; from gradcentral.experiment import run_comparison as r;"
        "r.write_report = lambda comparison: None; compare('mine.py', seeds=1, jobs=1, out='out', progress=False)"
    )

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    parts.write_text(PARTS.replace("SCALE = 1.0", "SCALE = 1.0\nself_training = True"))
    assert call().returncode == 0
    parts.write_text(parts.read_text() + "\n# A comment.\n")
    assert call().returncode == 0
    if number == 4:
        old, new = "self_training = True", "self_training = False"
        parts.write_text(parts.read_text().replace("torch.relu(x)", "(torch.relu(x) if self_training else x)"))
        assert call().returncode == 0  # rewritten, but it computes the same
    parts.write_text(parts.read_text().replace(old, new))
    changed = call()
    assert changed.returncode == 1
    assert "its runs belong to another task" in changed.stderr


class Lazily(Dataset[Any]):
    """Examples that are computed when they are read, with one changed target."""

    def __init__(self, changed: int | None = None) -> None:
        self.changed = changed

    def __len__(self) -> int:
        return 3000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((6,), index / 3000), torch.ones(2) if index == self.changed else torch.zeros(2)


def test_one_changed_example_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    data = torch.rand(20_000, 6), torch.zeros(20_000, 2)
    options: dict[str, Any] = {"batch_size": 4000, "epochs": 1}
    compare(tiny(train=TensorDataset(*data), **options), out=tmp_path / "memory")
    data[1][7777, 1] = 1
    with pytest.raises(ResultsError, match="Changed: train"):
        compare(tiny(train=TensorDataset(*data), **options), out=tmp_path / "memory")
    compare(tiny(train=Lazily(), **options), out=tmp_path / "lazy")
    compare(tiny(train=Lazily(), **options), out=tmp_path / "lazy")
    with pytest.raises(ResultsError, match="Changed: train"):
        compare(tiny(train=Lazily(1234), **options), out=tmp_path / "lazy")


def test_a_loader_with_other_data_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def loader(last: float) -> DataLoader[Any]:
        return DataLoader(
            TensorDataset(torch.ones(9, 6), torch.tensor([0.0] * 17 + [last]).view(9, 2)), 2, shuffle=True
        )

    compare(tiny(train=loader(0)), out=tmp_path)
    compare(tiny(train=loader(0)), out=tmp_path)
    with pytest.raises(ResultsError, match="Changed: train"):
        compare(tiny(train=loader(1)), out=tmp_path)


@pytest.mark.parametrize("name", ["torch", "gradcentral"])
def test_runs_of_other_versions_are_refused(tiny: Callable[..., Task], tmp_path: Path, name: str) -> None:
    compare(tiny(), out=tmp_path)
    stored = json.loads((tmp_path / FINGERPRINT).read_text())
    assert stored["torch"] == torch.__version__
    assert stored["gradcentral"] == metadata.version("gradcentral")
    (tmp_path / FINGERPRINT).write_text(json.dumps(stored | {name: "0.1"}))
    with pytest.raises(ResultsError, match=rf"Changed: {name} \(was 0\.1, is "):
        compare(tiny(), out=tmp_path)


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-5, True), (1.01, False)])
def test_numbers_are_compared_up_to_rounding(
    tiny: Callable[..., Task], tmp_path: Path, factor: float, same: bool
) -> None:
    compare(tiny(), out=tmp_path)
    stored = json.loads((tmp_path / FINGERPRINT).read_text())
    part = "two steps of sgd: losses, change of the weights"
    first, second, change = map(float, stored[part].removeprefix("≈ ").split(", "))
    stored[part] = f"≈ {first}, {second * factor}, {change}"
    (tmp_path / FINGERPRINT).write_text(json.dumps(stored))
    if same:
        compare(tiny(), out=tmp_path)
    else:
        with pytest.raises(ResultsError, match=re.escape(part)):
            compare(tiny(), out=tmp_path)


def test_the_number_of_threads_does_not_matter(tiny: Callable[..., Task], tmp_path: Path) -> None:
    first = compare(tiny(), out=tmp_path).fingerprint
    torch.set_num_threads(2)
    assert compare(tiny(), out=tmp_path).fingerprint == first
    assert torch.get_num_threads() == 2


def test_a_changed_file_of_a_custom_task_is_refused_unless_only_comments_changed(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "out"
    body = "def task(seed, arm):\n    yield {'train_loss': 0.1, 'test_metric': seed}\n"
    path.write_text(body)
    compare(path, out=out)
    path.write_bytes(b"\xef\xbb\xbf# A comment, and a byte order mark.\n" + body.encode())
    compare(path, seeds=2, out=out)
    path.write_text(body.replace("0.1", "0.2"))
    with pytest.raises(ResultsError, match="Changed: source"):
        compare(path, seeds=2, out=out)


MEMORY = """
import functools, torch, types
from gradcentral.experiment import Task, CustomTask
from gradcentral.experiment.fingerprint import fingerprint
from gradcentral.experiment.loading import LoadedTask
from gradcentral.experiment.training import Settings

note = types.SimpleNamespace(tags={"mean", "average", "sum"}, mask=torch.ones(3))
data = [{"input": torch.ones(3), "tags": {"mean", "average", "sum"}, "note": note} for _ in range(4)]
def loss(output, batch, modes={"mean", "average", "sum"}):
    return output.square().mean() if "mean" in modes else output.sum()
collate = lambda examples: {"input": torch.stack([example["input"] for example in examples])}
task = Task(name="memory", model=lambda: torch.nn.Linear(3, 2), train=data, test=data, loss=loss, collate=collate,
    metric=functools.partial(loss, modes={"mean", "sum"}), optimizers={"sgd": torch.optim.SGD}, batch_size=2)
print(fingerprint(LoadedTask(task), Settings(1), ("sgd",), ("none",)))
print(fingerprint(LoadedTask(CustomTask("mine", lambda seed, arm: [])), None, ("custom",), ("none",)))
"""


def test_the_fingerprint_of_a_task_from_memory_is_the_same_in_every_process() -> None:
    """The task's code comes from ``python -c``, where `inspect` finds no source."""
    found = {
        subprocess.run(
            [sys.executable, "-c", MEMORY],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(found) == 1


MOVED = """
import dataclasses, threading, torch
from gradcentral.experiment import Task

@dataclasses.dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor

class Cache:
    def __init__(self): self.lock = threading.Lock()

data = [Example(x, x[:2]) for x in torch.rand(8, 3)]  # drawn without a seed
def collate(examples): return torch.stack([e.x for e in examples]), torch.stack([e.y for e in examples])
def sgd(parameters):
    return torch.optim.SGD([{"params": list(parameters), "cache": Cache(), "rule": lambda step: step}], lr=0.1)
task = Task(name="moved", model=lambda: torch.nn.Linear(3, 2), train=data, test=data, loss=torch.nn.functional.mse_loss,
    metric=torch.nn.functional.l1_loss, optimizers={"sgd": sgd}, collate=collate, epochs=1,
    schedule=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps))
"""


def test_a_moved_file_continues_with_objects_and_random_data(tmp_path: Path) -> None:
    def at(folder: str) -> Path:
        path = tmp_path / folder / "moved.py"
        path.parent.mkdir()
        path.write_text(MOVED)
        return path

    state = torch.get_rng_state()
    runs = compare(at("one"), out=tmp_path / "out", seeds=1).all_runs
    assert compare(at("two"), out=tmp_path / "out", seeds=2, device="cpu:0", jobs=2).all_runs[: len(runs)] == runs
    assert torch.equal(torch.get_rng_state(), state)
    (tmp_path / "one" / "moved.py").write_text(MOVED.replace("Example(x, x[:2])", "Example(x, x[1:])"))
    with pytest.raises(ResultsError, match="Changed: train"):
        compare(tmp_path / "one" / "moved.py", out=tmp_path / "out")


COUNTED = """
import pathlib, torch
from torch.utils.data import TensorDataset
from gradcentral.experiment import Task
LOG = pathlib.Path(__file__).with_name("log")

def model():
    with LOG.open("a") as file:
        file.write("built\\n")
    return torch.nn.Linear(3, 2)

data = TensorDataset(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 2))
task = Task(name="counted", model=model, train=data, test=data, loss=torch.nn.functional.mse_loss,
    metric=torch.nn.functional.l1_loss, optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)}, epochs=1)
"""


def test_a_finished_comparison_trains_no_run_and_keeps_its_probe(tmp_path: Path) -> None:
    path, out = tmp_path / "counted.py", tmp_path / "out"
    path.write_text(COUNTED)

    def built() -> int:
        return len((tmp_path / "log").read_text().splitlines())

    first = compare(path, out=out)
    assert built() == 3 + 1 + 3  # fingerprint, probe, runs
    again = compare(path, out=out)
    assert built() == 7 + 3
    assert again.all_runs == first.all_runs
    assert again.fingerprint == first.fingerprint
    assert again.probe is not None
    assert again.probe == first.probe
    compare(path, seeds=2, out=out)
    assert built() == 10 + 3 + 3  # the stored probe belongs to the same task
    path.write_text(COUNTED.replace("lr=0.1", "lr=0.2"))
    with pytest.raises(ResultsError, match="optimizers"):
        compare(path, seeds=2, out=out)


def test_a_factory_that_returns_one_model_for_all_runs_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    net = nn.Linear(6, 2)
    for model in (lambda: net, lambda: nn.Sequential(net, nn.ReLU())):
        with pytest.raises(TaskError, match="model: two calls of the factory returned the same parameters"):
            compare(tiny(model=model), out=tmp_path)


def test_errors_in_a_task_precede_all_runs(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def failing(output: torch.Tensor, target: torch.Tensor) -> float:
        raise KeyError("label")

    with pytest.raises(
        TaskError, match=r"the task cannot be evaluated: KeyError: 'label' \(.*test_fingerprint\.py, line"
    ):
        compare(tiny(metric=failing), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_metric_that_needs_the_whole_test_set_is_evaluated_on_it(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def auc(output: torch.Tensor, target: torch.Tensor) -> float:
        if len(target) < 20:
            raise ValueError("only one class")
        return 0.5

    assert compare(tiny(metric=auc, batch_size=4), out=tmp_path).runs("sgd", "none")[0].final("test_metric") == 0.5
