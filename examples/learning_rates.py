"""Compare GC on the built-in digits at a low, the best and a high learning rate for each optimizer.

gradcentral compare examples/learning_rates.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gradcentral.experiment.tasks import digits


def sgd(lr: float) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    """Return the SGD of the built-in task with another learning rate."""
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=5e-4)


def adamw(lr: float) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    """Return the AdamW of the built-in task with another learning rate."""
    return lambda params: torch.optim.AdamW(params, lr=lr)


# The best rates without GC are 0.05 for SGD and 0.01 for AdamW.
task = dataclasses.replace(
    digits.task,
    name="learning-rates",
    optimizers={
        "sgd-0.01": sgd(0.01),
        "sgd-0.05": sgd(0.05),
        "sgd-0.1": sgd(0.1),
        "adamw-0.001": adamw(0.001),
        "adamw-0.01": adamw(0.01),
        "adamw-0.02": adamw(0.02),
    },
)
