"""The metrics of the built-in tasks."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["accuracy", "bits_per_character", "character_loss", "squared_error"]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of the batch whose largest output is that of the target."""
    return (output.argmax(-1) == target).float().mean()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return functional.mse_loss(output, target)


def character_loss(logits: Tensor, text: Tensor) -> Tensor:
    """Return the cross-entropy per character, in nats: logits ``[n, length, alphabet]``, text ``[n, length]``."""
    return functional.cross_entropy(logits.flatten(0, 1), text.flatten())


def bits_per_character(logits: Tensor, text: Tensor) -> Tensor:
    """Return the cross-entropy per character, in bits."""
    return character_loss(logits, text) / math.log(2)
