"""A small network with a convolution, a transposed convolution and a linear layer, and data for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gradcentral.paper.measurement import Measurement

mse = nn.functional.mse_loss
SGD_FACTORY = partial(torch.optim.SGD, lr=0.1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 5)
    )


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(8, 2, 4, 4, dtype=dtype), torch.randn(8, 5, dtype=dtype)


def holding(found: Sequence[Measurement]) -> list[bool]:
    return [measured.holds for measured in found]
