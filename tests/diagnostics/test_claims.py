"""One destination receives the records of one monitor, or of several with different names."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcentral.diagnostics.claims import Claim
from gradcentral.diagnostics.monitor import Monitor

REFUSED = (
    "already receives the records of another Monitor; give each Monitor its own name=, give another destination, or "
    "call remove\\(\\) on the other Monitor first"
)


class Training:
    """A model of its own, trained with a monitor."""

    def __init__(self, **arguments: Any) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.monitor = Monitor(self.model, self.optimizer, every=1, **arguments)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 3)).sum().backward()
        self.optimizer.step()


class Run:
    """A run of Weights & Biases, as far as a monitor uses it."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log(self, data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append((step, data))


class Board:
    """A SummaryWriter."""

    def __init__(self) -> None:
        self.tags: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.tags.append(tag)


def _destinations(kind: str, folder: Path) -> tuple[Any, Any]:
    """Return two ways to give the same destination."""
    if kind in ("run.jsonl", "run.csv"):
        (folder / "other").symlink_to(folder)
        return folder / kind, str(folder / "other" / kind)
    if kind == "folder":
        pytest.importorskip("tensorboard")
        return folder / "board", str(folder / "board")
    same = Run() if kind == "run" else Board()
    return same, same.log if isinstance(same, Run) else same


KINDS = ["run.jsonl", "run.csv", "folder", "run", "SummaryWriter"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_monitor_on_a_destination_is_refused_at_its_first_step(kind: str, tmp_path: Path) -> None:
    one, two = _destinations(kind, tmp_path)
    first, second = Training(to=one), Training(to=two)
    first.step()
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=f"to: .*{REFUSED}"):
            second.step()
    first.step()
    assert [record.step for record in first.monitor.records] == [0, 1]
    assert second.monitor.records == []
    first.monitor.remove()
    second.monitor.remove()


@pytest.mark.parametrize("remedy", ["name", "destination", "remove"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_remedies_for_a_destination_in_use_work(kind: str, remedy: str, tmp_path: Path) -> None:
    one, two = _destinations(kind, tmp_path)
    first = Training(to=one)
    first.step()
    arguments: dict[str, Any] = {"to": two, "step": 1}
    if remedy == "name":
        arguments["name"] = "other"
    elif remedy == "destination":
        arguments["to"] = tmp_path / "different.jsonl"
    else:
        first.monitor.remove()
    second = Training(**arguments)
    second.step()
    assert len(second.monitor.records) == 1
    first.monitor.remove()
    second.monitor.remove()


def test_a_function_of_a_record_may_serve_several_monitors() -> None:
    seen: list[Any] = []
    for name in ("one", None, None):
        Training(to=seen.append, name=name).step()
    assert [record.name for record in seen] == ["one", None, None]


def test_a_monitor_that_was_dropped_does_not_block_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    training = Training(to=path)
    torch.optim.lr_scheduler.StepLR(training.optimizer, 1)  # refers to the optimizer and back
    training.optimizer.cycle = training.optimizer  # type: ignore[attr-defined]
    training.step()
    del training
    gc.disable()
    try:
        Training(to=path, step=1).step()
    finally:
        gc.enable()
    assert [record.step for record in Monitor.read(path)] == [0, 1]


def test_an_error_while_starting_frees_all_destinations(tmp_path: Path) -> None:
    first = Training(to=tmp_path / "one.jsonl")
    first.step()
    second = Training(to=[tmp_path / "two.jsonl", tmp_path / "one.jsonl"])
    with pytest.raises(ValueError, match="one.jsonl already"):
        second.step()
    Training(to=tmp_path / "two.jsonl").step()
    assert len(Monitor.read(tmp_path / "two.jsonl")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_a_path_is_locked_as_long_as_the_other_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    lock = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(); sys.stdin.read()"
    arguments = [sys.executable, "-c", lock, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match="to: run receives .* in another process; give another path"):
            Claim(path, None, "run")
        other = tmp_path / "other.jsonl"
        other.touch()
        Claim(other, None, "other").release()
        process.kill()
        process.wait()
    claim = Claim(path, None, "run")
    probe = [sys.executable, "-c", "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"]
    assert subprocess.run([*probe, str(path)], capture_output=True, check=False).returncode == 1
    claim.release()
    claim.release()  # harmless
    assert subprocess.run([*probe, str(path)], capture_output=True, check=False).returncode == 0
