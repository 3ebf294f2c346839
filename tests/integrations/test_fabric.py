"""Lightning Fabric: GC attached before or after ``fabric.setup`` equals loops with GC written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradcentral
from tests.integrations import hand_written
from tests.integrations.hand_written import adamw, batches, difference, network
from tests.integrations.lightning_runs import QUIET

fabric_package = pytest.importorskip("lightning.fabric", reason="needs lightning: run `make trainers`")

pytestmark = QUIET
ROUNDING = 1e-6
PLACEMENT = "update"


def prepare(way: str, precision: str = "32-true") -> tuple[Any, Any, Any, nn.Module]:
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1, precision=precision)
    net = network()
    if way == "gradcentral":
        optimizer: Any = gradcentral.AdamW(net, lr=0.01, weight_decay=0.1, placement=PLACEMENT)
    else:
        optimizer = adamw(net.parameters())
    if way == "before setup":
        gradcentral.centralize(optimizer, net, PLACEMENT)
    model, wrapped = fabric.setup(net, optimizer)
    if way == "after setup":
        gradcentral.centralize(wrapped, model, PLACEMENT)
    return fabric, model, wrapped, net


def train(fabric: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for images, classes in loader:
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(images), classes))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("way", ["before setup", "after setup", "gradcentral"])
def test_training_equals_a_loop_written_by_hand(way: str, precision: str) -> None:
    fabric, model, optimizer, net = prepare(way, precision)
    train(fabric, model, optimizer, batches())

    def loss(by_hand: nn.Module, batch: hand_written.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return cross_entropy(by_hand(batch[0]), batch[1])

    by_hand = hand_written.train(network(), batches(), adamw, PLACEMENT, clip=0.5, loss=loss)
    assert difference(net, by_hand) < ROUNDING
    without = hand_written.train(network(), batches(), adamw, None, clip=0.5, loss=loss)
    assert difference(net, without) > 100 * ROUNDING


def test_centralize_gradients_before_clipping() -> None:
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1)
    net = network()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for images, classes in batches():
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(images), classes))
        gradcentral.centralize_gradients(model)
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
    by_hand = hand_written.train(network(), batches(), clip=0.05, clip_first=False)
    assert difference(net, by_hand) < ROUNDING


@pytest.mark.parametrize("way", ["after setup", "gradcentral"])
def test_a_resumed_run_is_bit_identical(way: str, tmp_path: Path) -> None:
    fabric, model, optimizer, net = prepare(way)
    train(fabric, model, optimizer, batches()[:4])
    fabric.save(tmp_path / "first.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, batches()[4:])
    fabric, model, optimizer, resumed = prepare(way)
    fabric.load(tmp_path / "first.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, batches()[4:])
    assert all(map(torch.equal, net.parameters(), resumed.parameters()))
