"""Regression on the diabetes data of scikit-learn: a three-layer network with sigmoid or with ReLU."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import squared_error
from gradcentral.experiment.tasks.optimizers import optimizers, tuned, warm_up_then_cosine
from gradcentral.experiment.tasks.sources import diabetes

__all__ = ["network", "tasks"]

TRAIN_SIZE = 288


def network(activation: type[nn.Module]) -> nn.Module:
    """Build two hidden layers of 64 units, ``[n, 10]`` to ``[n, 1]``."""
    return nn.Sequential(nn.Linear(10, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 1))


_inputs, _targets = diabetes()
_order = torch.randperm(len(_inputs), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
_train, _test = (TensorDataset(_inputs[part], _targets[part]) for part in (_order[:TRAIN_SIZE], _order[TRAIN_SIZE:]))
tasks = {
    name: Task(
        name=name,
        model=partial(network, activation),
        train=_train,
        test=_test,
        loss=functional.mse_loss,
        metric=squared_error,
        optimizers=optimizers(tuned(name)),
        schedule=warm_up_then_cosine,
        batch_size=32,
        epochs=30,
        higher_is_better=False,
    )
    for name, activation in (("tabular-sigmoid", nn.Sigmoid), ("tabular-relu", nn.ReLU))
}
