"""Trainings with Hugging Face's libraries that run in each process of a group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.integrations.hand_written import difference
from tests.integrations.hugging_face import build, data, train_by_hand, trainer

# isort: split
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import gradcentral
from gradcentral.integrations.transformers import GradientCentralization

__all__ = ["error_of_fsdp1", "train_with_accelerate", "train_with_trainer"]


def train_with_trainer(kind: str, folder: str) -> tuple[float, float]:
    """Train with a Trainer; return the differences from the loop by hand with and without centering.

    Args:
        kind: "DDP" or "FSDP2".
        folder: for checkpoints.
    """
    _new_accelerator_state()
    model, callback = build(), GradientCentralization(monitor=1)
    trained = trainer(Path(folder), model, callback, per_device_train_batch_size=2, max_grad_norm=0.2)
    if kind != "DDP":
        _shard_on_the_cpu(kind)
        trained.is_fsdp_enabled = True
    trained.train()
    assert callback.monitor is not None
    assert len(callback.monitor.records) == 4
    wrapper = {"DDP": "DistributedDataParallel", "FSDP2": "FSDPGPT2LMHeadModel"}[kind]
    assert type(trained.model_wrapped).__name__ == wrapper
    return _differences(trained.model, clip=0.2)


def train_with_accelerate(kind: str, how: str) -> tuple[float, float]:
    """Train with an Accelerator; return the differences from the loop by hand with and without centering.

    Args:
        kind: "DDP" or "FSDP2".
        how: what centers: "before" and "after" attach before and after ``prepare``; "SGD"; "gradients".
    """
    _new_accelerator_state()
    accelerator = Accelerator(cpu=True)
    if kind != "DDP":
        _shard_on_the_cpu(kind)
    net = build()
    optimizer: Any = gradcentral.SGD(net, lr=0.1) if how == "SGD" else torch.optim.SGD(net.parameters(), lr=0.1)
    if how == "before":
        gradcentral.centralize(optimizer, net)
    model, optimizer = accelerator.prepare(net, optimizer)
    assert type(model).__name__ == {"DDP": "DistributedDataParallel", "FSDP2": "FSDPGPT2LMHeadModel"}[kind]
    if how == "after":
        gradcentral.centralize(optimizer, model)
    tokens = torch.stack([block["input_ids"] for block in data()]).split(2)[accelerator.process_index :: 2]
    for batch in tokens[:4]:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
        if how == "gradients":
            gradcentral.centralize_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return _differences(accelerator.unwrap_model(model), clip=0.2)


def error_of_fsdp1(folder: str) -> str:
    """Return the error of a Trainer with FSDP1."""
    _new_accelerator_state()
    trained = trainer(Path(folder), build(), GradientCentralization())
    _shard_on_the_cpu("FSDP1")
    trained.is_fsdp_enabled = True
    try:
        trained.train()
    except ValueError as error:
        return str(error)
    return ""


def _differences(model: nn.Module, **by_hand: Any) -> tuple[float, float]:
    whole = build()
    with torch.no_grad():
        for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs)
    centered = train_by_hand(build(), steps=4, **by_hand)
    uncentered = train_by_hand(build(), steps=4, center=None, **by_hand)
    return difference(whole, centered), difference(whole, uncentered)


def _new_accelerator_state() -> None:
    """Forget the previous case, and let accelerate use the process group that exists."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])


def _shard_on_the_cpu(kind: str) -> None:
    """Let accelerate shard: it supports FSDP on accelerators only, and would use DDP instead without an error."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2 if kind == "FSDP2" else 1,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
    )
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
