"""``digits-vit``: a tiny pre-LayerNorm transformer. LayerNorm leaves GC little to remove."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from gradcentral.experiment.tasks import digits
from gradcentral.experiment.tasks.optimizers import warm_up_then_cosine

__all__ = ["task"]

WIDTH, HEADS, DEPTH, PATCH, PATCHES = 32, 4, 2, 2, 16


class VisionTransformer(nn.Module):
    """A vision transformer with 2×2 patches, two blocks and mean pooling: ``[n, 1, 8, 8]`` to ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Embedding(PATCHES, WIDTH)
        block = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(block(WIDTH, HEADS, 2 * WIDTH) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Normalize pixels to [-1, 1], as usual for transformers.
        patches = nn.functional.unfold((images - 0.5) / 0.5, PATCH, stride=PATCH).mT
        x = self.blocks(self.patch(patches) + self.position.weight)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


# The learning rates are the best of a sweep (0.005 to 0.2; 0.001 to 0.02) for training WITHOUT GC.
task = dataclasses.replace(
    digits.task,
    name="digits-vit",
    model=VisionTransformer,
    optimizers={
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    },
    schedule=warm_up_then_cosine,
)
