"""``digits-vit``: a tiny pre-LayerNorm transformer. LayerNorm leaves GC little to remove."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from gradcentral.experiment.tasks import digits

__all__ = ["task"]

WIDTH, HEADS, DEPTH, PATCH, PATCHES = 32, 4, 2, 2, 16


class Block(nn.Module):
    """A pre-LayerNorm block: attention and an MLP, each with a residual connection; ``[n, 16, 32]`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and the MLP."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches of 2×2 pixels, two blocks, the mean over patches: ``[n, 1, 8, 8]`` to ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Embedding(PATCHES, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        # Normalize pixels to [-1, 1], as is usual for transformers.
        patches = nn.functional.unfold((images - 0.5) / 0.5, PATCH, stride=PATCH).mT
        x = self.blocks(self.patch(patches) + self.position.weight)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def warm_up_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up over a tenth of the steps, then decay to zero: the usual schedule of transformers."""
    warm = max(1, steps // 10)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warm, total_iters=warm)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warm))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warm])


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
