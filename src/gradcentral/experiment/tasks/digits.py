"""``digits``: a four-layer ReLU CNN without normalization. Where GC has most to do: every input has a mean."""

from __future__ import annotations

import torch
from torch import nn

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks._digits import accuracy, digits

__all__ = ["task"]


def cnn() -> nn.Module:
    """Three convolutions and a linear layer, ``[n, 1, 8, 8]`` to ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


# The best learning rates of a sweep (0.005 to 0.1; 0.0005 to 0.02) for training WITHOUT GC, within the seeds' spread.
train, test = digits()
task = Task(
    name="digits",
    model=cnn,
    train=train,
    test=test,
    loss=nn.functional.cross_entropy,
    metric=accuracy,
    optimizers={
        "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4),
        "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    },
)
