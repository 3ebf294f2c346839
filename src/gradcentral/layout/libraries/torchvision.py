"""torchvision, as of version 0.28."""

from __future__ import annotations

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LibraryTable, axes

__all__ = ["CONVOLUTIONS", "TABLE"]

CONVOLUTIONS = ("*.DeformConv2d",)

TABLE: LibraryTable = {
    "*.DeformConv2d": {"weight": axes("o [i k k]", o="out_channels")},
    "*.PositionalEncoding": {"*_pos": skip.POSITION},
    "*": skip.NAMES,
}
