"""``digits-batchnorm``: the digits' CNN with BatchNorm, as most people would build it."""

from __future__ import annotations

import dataclasses

from torch import nn

from gradcentral.experiment.tasks import digits

__all__ = ["task"]


def cnn_with_batchnorm() -> nn.Module:
    """The same layers, each convolution followed by BatchNorm, which takes over its bias."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


task = dataclasses.replace(digits.task, name="digits-batchnorm", model=cnn_with_batchnorm)
