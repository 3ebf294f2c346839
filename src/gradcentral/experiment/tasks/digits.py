"""``digits``: a four-layer ReLU CNN without normalization, on the 8×8 digits bundled with scikit-learn (no download).

GC acts strongly here, because the input of every layer after the first is non-negative and thus has a large mean.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import accuracy
from gradcentral.extras import optional

__all__ = ["cnn", "task", "test", "train"]

# 28 whole batches of 32: a last batch of four examples would disturb BatchNorm, with and without GC.
TRAIN_SIZE = 896


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Load 896 training and 901 test images ``[n, 1, 8, 8]`` in [0, 1] with their digits, one split for all seeds."""
    images, targets = optional("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32, device="cpu").reshape(-1, 1, 8, 8) / 16
    y = torch.as_tensor(targets, dtype=torch.int64, device="cpu")
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    train, test = order[:TRAIN_SIZE], order[TRAIN_SIZE:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def cnn(*, batchnorm: bool = False) -> nn.Module:
    """Build three convolutions and a linear layer, ``[n, 1, 8, 8]`` to ``[n, 10]``."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=not batchnorm))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batchnorm else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


# The learning rates are the best of a sweep (0.005 to 0.1; 0.0005 to 0.02) for training WITHOUT GC.
train, test = datasets()
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
