"""Classify wines by their chemistry with a small sigmoid network.

``gradcentral compare --example`` writes this file as my_task.py: replace the data, the model and the optimizers with
your own, then run ``gradcentral compare my_task.py``.
"""

import torch
from sklearn.datasets import load_wine
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gradcentral.experiment import Task


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Load 178 wines of three growers with 13 measurements each; the split is the same for every seed."""
    measurements, growers = load_wine(return_X_y=True)
    x, y = torch.tensor(measurements, dtype=torch.float32), torch.tensor(growers)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:100], order[100:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def model() -> nn.Module:
    """Build the network. A sigmoid's output is positive, so the gradient of the next layer has a large mean."""
    return nn.Sequential(
        nn.Linear(13, 32),
        nn.Sigmoid(),
        nn.Linear(32, 32),
        nn.Sigmoid(),
        nn.Linear(32, 3),
    )


def macro_f1(output: Tensor, target: Tensor) -> float:
    """Return the mean F1 over the growers. A metric is given the whole test set, so it need not be a mean."""
    return float(f1_score(target, output.argmax(-1), average="macro"))


train, test = datasets()
task = Task(
    name="wine",  # the results go to runs/wine
    model=model,  # called once per run, after the seed is set
    train=train,  # a map-style dataset, or a DataLoader
    test=test,
    loss=nn.functional.cross_entropy,  # loss(output, target), the mean over the batch
    metric=macro_f1,  # metric(output, target); add higher_is_better=False for an error
    optimizers={  # each is trained with and without GC; choose the learning rates without GC
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    },
    batch_size=20,
    epochs=20,
)
