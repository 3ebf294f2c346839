"""How the tests of training create an optimizer that centers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import gradcentral


def create_optimizer(who: str, kind: str, model: nn.Module, placement: str, options: dict[str, Any]) -> Optimizer:
    """Return gradcentral's optimizer of this kind, or torch's with centering attached ("attached")."""
    if who == "gradcentral":
        optimizer: Optimizer = getattr(gradcentral, kind)(model, placement=placement, **options)
        return optimizer
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    gradcentral.centralize(optimizer, model, placement)
    return optimizer
