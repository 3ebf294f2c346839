"""PyTorch-Ignite: supervised trainers with GC equal loops with GC written by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.integrations import hand_written
from tests.integrations.hand_written import adamw, batches, difference, network
from tests.integrations.pages import run_page

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.* is deprecated", DeprecationWarning)
    engine = pytest.importorskip("ignite.engine", reason="needs pytorch-ignite: run `make trainers`")
    from ignite.handlers import Checkpoint, DiskSaver

ROUNDING = 1e-6


def create(way: str, placement: str = "update", **options: Any) -> tuple[Any, nn.Module, Any, gradcentral.Monitor]:
    net = network()
    if way == "gradcentral":
        optimizer: Any = gradcentral.AdamW(net, lr=0.01, weight_decay=0.1, placement=placement)
    else:
        optimizer = adamw(net.parameters())
        gradcentral.centralize(optimizer, net, placement)
    monitor = gradcentral.Monitor(net, optimizer, every=4)
    return engine.create_supervised_trainer(net, optimizer, cross_entropy, **options), net, optimizer, monitor


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("way", ["attached", "gradcentral"])
def test_training_equals_a_loop_written_by_hand(way: str, placement: str, accumulate: int) -> None:
    trainer, net, _, _ = create(way, placement, gradient_accumulation_steps=accumulate)
    trainer.run(batches(), max_epochs=1)
    by_hand = hand_written.train(network(), batches(), adamw, placement, accumulate=accumulate)
    assert difference(net, by_hand) < ROUNDING
    assert difference(net, hand_written.train(network(), batches(), adamw, None)) > 100 * ROUNDING


def test_a_checkpoint_resumes_bit_identically_with_its_monitor(tmp_path: Path) -> None:
    trainer, net, optimizer, monitor = create("attached")
    saved = {"model": net, "optimizer": optimizer, "trainer": trainer, "monitor": monitor}
    checkpoint = Checkpoint(saved, DiskSaver(tmp_path, require_empty=False))
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED(once=1), checkpoint)
    trainer.run(batches(), max_epochs=2)

    trainer, resumed, optimizer, continued = create("attached")
    objects = {"model": resumed, "optimizer": optimizer, "trainer": trainer, "monitor": continued}
    Checkpoint.load_objects(objects, torch.load(checkpoint.last_checkpoint, weights_only=True))
    trainer.run(batches(), max_epochs=2)
    assert all(map(torch.equal, net.parameters(), resumed.parameters()))
    assert continued.records == monitor.records[2:]
    assert [record.step for record in continued.records] == [8, 12]


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("ignite")
    assert page["drift"] < 1e-6
    assert [record.step for record in gradcentral.Monitor.read("gc.jsonl")] == [0, 10]
