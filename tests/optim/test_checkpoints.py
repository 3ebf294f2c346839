"""Resumed training runs are bit-identical: torch.save, distributed checkpoints, safetensors, and after SIGKILL."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.optim import killed_training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trainings() -> dict[str, list[dict[str, Any]]]:
    """Return the results of `killed_training`, which runs in its own process."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork: run it on Linux or macOS")
    path = os.pathsep.join([str(Path(gradcentral.__file__).parents[1]), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.killed_training"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", killed_training.CASES)
def test_resuming_after_sigkill_is_bit_identical(case: str, trainings: dict[str, list[dict[str, Any]]]) -> None:
    assert len(trainings[case]) == killed_training.REPEATS
    for training in trainings[case]:
        assert training["differing"] == [], training


def test_the_runs_were_killed_and_resumed_from_checkpoints(trainings: dict[str, list[dict[str, Any]]]) -> None:
    """Some runs end before the signal arrives, and some start again from step 0, but not all of them."""
    every = [training for repeats in trainings.values() for training in repeats]
    assert sum(training["killed"] for training in every) > len(every)
    assert len({start for training in every for start in training["starts"]}) > 3


def _through_torch(state: dict[str, Any], folder: Path) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}


def _make(who: str, kind: str, placement: str, model: nn.Module) -> Optimizer:
    if who == "gradcentral":
        optimizer: Optimizer = getattr(gradcentral, kind)(model, placement=placement, **KINDS[kind])
        return optimizer
    optimizer = getattr(torch.optim, kind)(model.parameters(), **KINDS[kind])
    gradcentral.centralize(optimizer, model, placement)
    return optimizer


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def _train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def every_optimizer(test: Callable[..., None]) -> Callable[..., None]:
    for name, values in (("placement", PLACEMENTS), ("kind", KINDS), ("who", ("attached", "gradcentral"))):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@every_optimizer
def test_resuming_from_torch_save_is_bit_identical(who: str, kind: str, placement: str, tmp_path: Path) -> None:
    model = _network(0)
    optimizer = _make(who, kind, placement, model)
    _train(model, optimizer, range(3))
    found = _through_torch({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    twin = _network(1)
    resumed = _make(who, kind, placement, twin)
    twin.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    _train(model, optimizer, range(3, 6))
    _train(twin, resumed, range(3, 6))
    assert _same_weights(model, twin)


@every_optimizer
def test_resuming_from_a_distributed_checkpoint_is_bit_identical(
    who: str, kind: str, placement: str, tmp_path: Path
) -> None:
    """torch takes a step with zero gradients to create the state to load; it must not change the weights."""
    model = _network(0)
    optimizer = _make(who, kind, placement, model)
    _train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    twin = _network(1)
    resumed = _make(who, kind, placement, twin)
    before = copy.deepcopy(twin)
    with warnings.catch_warnings():
        # torch warns that there is no process group, and about its own deprecations.
        warnings.simplefilter("ignore")
        save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        found: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(twin, resumed), strict=True))
        assert _same_weights(twin, before)
        load(found, checkpoint_id=tmp_path)
    set_state_dict(twin, resumed, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    _train(model, optimizer, range(3, 6))
    _train(twin, resumed, range(3, 6))
    assert _same_weights(model, twin)


@pytest.mark.parametrize("who", ["attached", "gradcentral"])
def test_resuming_from_safetensors_weights_is_bit_identical(who: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    model = _network(0)
    _train(model, _make(who, "SGD", "gradient", model), range(3))
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    twin = _network(1)
    optimizer = _make(who, "SGD", "gradient", twin)
    twin.load_state_dict(safetensors.load_file(tmp_path / "weights.safetensors"))
    assert _same_weights(model, twin)
    _train(model, _make(who, "SGD", "gradient", model), range(3, 6))
    _train(twin, optimizer, range(3, 6))
    assert _same_weights(model, twin)
