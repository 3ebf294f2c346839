"""A task that trains in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcentral.experiment import Task, determinism


def mean_absolute_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).abs().mean()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def make_task(**changes: Any) -> Task:
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2] - x[:, 3]], 1)
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": network,
        "train": TensorDataset(x[:40], y[:40]),
        "test": TensorDataset(x[40:], y[40:]),
        "loss": nn.functional.mse_loss,
        "metric": mean_absolute_error,
        "optimizers": {"sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)},
        "batch_size": 16,
        "epochs": 2,
        "higher_is_better": False,
    }
    return Task(**fields | changes)


@pytest.fixture
def tiny() -> Callable[..., Task]:
    return make_task


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread as workers do, so that runs in this process and in workers are bit-identical."""
    with determinism.one_thread():
        yield
