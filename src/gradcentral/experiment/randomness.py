"""Random numbers: one seed decides them all."""

from __future__ import annotations

import hashlib
import random

import torch

from gradcentral.extras import optional

__all__ = ["derive", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    np = optional("numpy")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derive(seed: int, purpose: str) -> int:
    """Another seed below 2³² that depends on both: what one purpose draws must not shift what another does.

    >>> derive(0, "order") == derive(0, "order") != derive(0, "training")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")
