"""A distributed checkpoint from four ranks resumes on two: loading it reshards parameters and state."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.distributed.sharding import shard_and_average
from tests.distributed.workers import Workers

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01},
}


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    # 10 and 3 rows: the shards of four ranks are uneven, and one rank holds no row of the last layer.
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def _optimizer(who: str, kind: str, placement: str, model: nn.Module) -> Optimizer:
    if who == "gradcentral":
        optimizer: Optimizer = getattr(gradcentral, kind)(model, placement=placement, **OPTIONS[kind])
        return optimizer
    optimizer = getattr(torch.optim, kind)(model.parameters(), **OPTIONS[kind])
    gradcentral.centralize(optimizer, model, placement)
    return optimizer


def _train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss: Tensor = (model(torch.randn(8, 6, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step()


def _full_tensors(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def _train_three_steps(
    case: tuple[str, str, str], folder: Path, ranks: int, resume: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Train three steps, then save a checkpoint, or resume from one first. Return the weights before and after."""
    model = _network()
    if resume:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    shard_and_average(model, init_device_mesh("cpu", (ranks,)))
    optimizer = _optimizer(*case, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own deprecations
        if resume:
            weights, state = get_state_dict(model, optimizer)
            load({"model": weights, "optimizer": state}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        before = [w.clone() for w in _full_tensors(model)]
        _train(model, optimizer, range(3, 6) if resume else range(3))
        if not resume:
            weights, state = get_state_dict(model, optimizer)
            save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return before, [w.clone() for w in _full_tensors(model)]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("who", ["attached", "gradcentral"])
def test_a_checkpoint_of_four_ranks_resumes_on_two(
    who: str, kind: str, placement: str, tmp_path: Path, four_ranks: Workers, two_ranks: Workers
) -> None:
    case = (who, kind, placement)
    _, saved = four_ranks.run(_train_three_steps, case, tmp_path, 4, False)[0]
    loaded, final = two_ranks.run(_train_three_steps, case, tmp_path, 2, True)[0]
    assert all(torch.equal(one, other) for one, other in zip(loaded, saved, strict=True))
    alone = _network()
    _train(alone, _optimizer(*case, alone), range(6))
    for found, p in zip(final, alone.parameters(), strict=True):
        torch.testing.assert_close(found, p.detach(), rtol=0, atol=1e-6)
