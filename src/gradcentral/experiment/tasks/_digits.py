"""scikit-learn's bundled 8×8 digits as tensors: real data that needs no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["accuracy", "digits"]


def digits(train_size: int = 900) -> tuple[TensorDataset, TensorDataset]:
    """Images ``[n, 1, 8, 8]`` between 0 and 1 with their digits, split once for all seeds, stratified by digit."""
    images, targets = load_digits(return_X_y=True)
    split = train_test_split(images, targets, train_size=train_size, stratify=targets, random_state=0)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in split)
    return (
        TensorDataset(x_train.float().reshape(-1, 1, 8, 8) / 16, y_train),
        TensorDataset(x_test.float().reshape(-1, 1, 8, 8) / 16, y_test),
    )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Part of the batch whose largest output is the target's."""
    return (output.argmax(-1) == target).float().mean()
