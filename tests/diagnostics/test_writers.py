"""TensorBoard, loggers and functions receive every record, and none of them can stop the training."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
