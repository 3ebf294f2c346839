"""scikit-learn's bundled 8×8 digits as tensors: real data that needs no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["accuracy", "digits"]

# 28 batches of 32: a last one of four would upset BatchNorm, with and without GC.
TRAIN_SIZE = 896


def digits() -> tuple[TensorDataset, TensorDataset]:
    """896 training and 901 test images ``[n, 1, 8, 8]`` between 0 and 1 with their digits, one split for all seeds."""
    images, targets = load_digits(return_X_y=True)
    x = torch.as_tensor(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.as_tensor(targets)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_SIZE], order[TRAIN_SIZE:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Part of the batch whose largest output is the target's."""
    return (output.argmax(-1) == target).float().mean()
