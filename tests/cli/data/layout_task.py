"""A task for the layout command; it is never trained."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcentral.experiment import Task

_examples = TensorDataset(torch.zeros(8, 4), torch.zeros(8, 2))

task = Task(
    name="layout",
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    train=_examples,
    test=_examples,
    loss=nn.functional.mse_loss,
    metric=nn.functional.l1_loss,
    optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)},
    higher_is_better=False,
)
