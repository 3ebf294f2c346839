"""torchvision. Read in version 0.28."""

from __future__ import annotations

from gradcentral.layouts.reasons import NAMES, POSITION
from gradcentral.layouts.rules import LibraryTable
from gradcentral.layouts.shapes import weights

__all__ = ["CONVOLUTIONS", "TABLE"]

CONVOLUTIONS = ("*.DeformConv2d",)

TABLE: LibraryTable = {
    "*.DeformConv2d": {"weight": weights("o i i i", o="out_channels")},
    "*.PositionalEncoding": {"*_pos": POSITION},
    "*": NAMES,
}
