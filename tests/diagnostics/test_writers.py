"""TensorBoard, loggers and functions receive every record, and none of them can stop the training."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcentral.diagnostics.monitor import Monitor
from gradcentral.diagnostics.record import Reading, Record
from gradcentral.diagnostics.writers import writers_for
from gradcentral.extras import MissingExtraError


def _record(step: int) -> Record:
    layer = Reading(0.25, 2.0, 1.5, 1.0, 0.875, 1e-9, 2e-9, 0.5, 12345.0)
    return Record(step, "gradient", False, Reading(norm=3.0, drift=0.5), {'a,"b".weight': layer, "c": Reading()})


def _train(steps: int, **arguments: Any) -> Monitor:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **arguments) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.rand(3, 4)).square().sum().backward()
            optimizer.step()
    return monitor


def test_every_function_of_a_list_receives_every_record() -> None:
    seen: list[Record] = []
    also: list[int] = []
    monitor = _train(3, every=2, to=[seen.append, lambda record: also.append(record.step)])
    assert seen == monitor.records
    assert also == [0, 2]


class _Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_a_summary_writer_receives_finite_scalars_only() -> None:
    writer = _Writer()
    (write,) = writers_for(writer)
    write(_record(5))
    assert writer.scalars["gc/norm", 5] == 3.0
    assert writer.scalars['gc_share/a,"b".weight', 5] == 0.25
    assert ("gc/share", 5) not in writer.scalars
    assert len(writer.scalars) == 2 + 9
    assert writer.scalars == {(tag, 5): value for tag, value in _record(5).scalars().items()}


def test_the_tags_of_a_named_monitor_start_with_its_name() -> None:
    tags = replace(_record(5), name="critic").scalars()
    assert tags.keys() == {f"critic/{tag}" for tag in _record(5).scalars()}


# Loggers, with the signatures of the real ones.

Logged = list[tuple[dict[str, float], int | None]]
logged: Logged = []


class WandbRun:
    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        logged.append((data, step))


class LightningLogger:
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        logged.append((metrics, step))


class Accelerator:
    def log(self, *args: Any, **kwargs: Any) -> None:  # a decorator hides its parameters
        logged.append((*args, kwargs["step"]))


class Fabric:
    def log(self, name: str, value: Any, step: int | None = None) -> None:
        raise AssertionError("takes one number")

    def log_dict(self, metrics: dict[str, Any], step: int | None = None) -> None:
        logged.append((metrics, step))


class CometExperiment:
    def log_metrics(self, dic: Any, prefix: Any = None, step: int | None = None, epoch: Any = None) -> None:
        logged.append((dic, step))


def log_metrics(metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None) -> None:
    logged.append((metrics, step))


@pytest.mark.parametrize(
    "to",
    [
        WandbRun(),
        WandbRun().log,
        functools.partial(WandbRun().log, commit=False),
        LightningLogger(),
        Accelerator(),
        Fabric(),
        CometExperiment(),
        log_metrics,
    ],
    ids=[
        "run",
        "wandb.log",
        "partial",
        "Lightning",
        "accelerate",
        "Fabric",
        "Comet",
        "MLflow",
    ],
)
def test_loggers_receive_scalars_and_the_step(to: Any) -> None:
    logged.clear()
    monitor = _train(4, every=2, to=to)
    assert logged == [(record.scalars(), record.step) for record in monitor.records]
    assert len(logged) == 2
    assert all(isinstance(value, float) for value in logged[0][0].values())


class LightningModule:
    def log(self, name: str, value: Any, on_step: bool | None = None) -> None: ...

    def log_dict(self, dictionary: dict[str, Any], on_step: bool | None = None) -> None: ...


class Trainer:
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None: ...


def log_metric(key: str, value: float, step: int | None = None) -> None: ...


@functools.wraps(WandbRun.log)
def wandb_log_before_init(*args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    "to", [logging.getLogger(), LightningModule(), Trainer(), log_metric, wandb_log_before_init, _Writer, 3]
)
def test_loggers_of_other_kinds_are_refused_with_a_remedy(to: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TypeError, match="to must be a path .*; for any other logger, give a function such as "
    ) as caught:
        writers_for(to)
    (write,) = writers_for(eval(str(caught.value).partition("such as ")[2]))
    write(_record(5))
    assert capsys.readouterr().out == f"{_record(5).scalars()}\n"


@pytest.mark.parametrize("to", [lambda record: received.append(record), lambda *a, **k: received.append(a[0])])
def test_other_functions_receive_the_record(to: Any) -> None:
    received.clear()
    monitor = _train(3, every=2, to=to)
    assert received == monitor.records


received: list[Record] = []


# Failures.


class StopError(Exception):
    """An exception of a user's function."""


@pytest.mark.parametrize("failing", [[0], [1, 2], [0, 2]])
def test_an_exception_of_a_function_is_one_warning(failing: list[int]) -> None:
    seen: list[int] = []

    def function(record: Record) -> None:
        if record.step in failing:
            raise StopError(f"at step {record.step}")
        seen.append(record.step)

    others: list[Record] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = _train(4, every=1, to=[function, others.append])
    assert seen == [step for step in range(4) if step not in failing]
    assert monitor.records == others
    assert [record.step for record in others] == [0, 1, 2, 3]
    messages = [str(warning.message) for warning in caught if "was not written" in str(warning.message)]
    assert len(messages) == 1
    assert f"function: the record of step {failing[0]} was not written" in messages[0]
    assert f"StopError: at step {failing[0]})" in messages[0]


def test_training_is_the_same_if_writing_fails() -> None:
    def train(to: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, every=1, to=to):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.rand(3, 4)).square().sum().backward()
                optimizer.step()
        return model.weight.detach()

    def fail(record: Record) -> None:
        raise StopError

    with pytest.warns(UserWarning, match="was not written"):
        failed = train(fail)
    assert torch.equal(failed, train(None))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_is_written_again_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    (write,) = writers_for(tmp_path / "board")
    flush = SummaryWriter.flush

    def fail(writer: Any) -> None:
        flush(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    write(_record(0))
    monkeypatch.setattr(SummaryWriter, "flush", fail)
    with pytest.warns(UserWarning, match="step 1 was not written .*No space left"):
        write(_record(1))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="written again from step 2 on; the 1 before"):
        write(_record(2))
    write.close()
    write.close()
    events_of = importlib.import_module("tensorboard.backend.event_processing.event_multiplexer").EventMultiplexer
    board = events_of().AddRunsFromDirectory(str(tmp_path / "board")).Reload()
    (run,) = board.Runs()
    assert {0, 2} <= {scalar.step for scalar in board.Scalars(run, "gc/norm")}


def test_an_exception_while_closing_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def fail(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "close", fail)
    with pytest.warns(UserWarning, match="board: could not be closed .*No space left on device"):
        monitor = _train(3, every=2, to=tmp_path / "board")
    assert len(monitor.records) == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_folder_is_written_by_tensorboard(tmp_path: Path) -> None:
    events_of = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    monitor = _train(4, every=2, to=tmp_path / "board")
    events = events_of(str(tmp_path / "board")).Reload()
    scalars = events.Scalars("gc_share/weight")
    assert [scalar.step for scalar in scalars] == [0, 2]
    assert scalars[0].value == pytest.approx(monitor.records[0].layers["weight"].share, rel=1e-6)


def test_a_folder_without_tensorboard_raises_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"tensorboard is not installed: pip install '.*\[(.*)\]'") as caught:
        writers_for(tmp_path / "board")
    extras = importlib.metadata.metadata("gradcentral").get_all("Provides-Extra") or []
    assert re.findall(r"\[(.*)\]", str(caught.value))[0] in extras
