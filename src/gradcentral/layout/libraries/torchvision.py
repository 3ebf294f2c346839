"""torchvision. Read in version 0.28."""

from __future__ import annotations

from gradcentral.layout.libraries.reasons import NAMES, POSITION
from gradcentral.layout.rules import LibraryTable
from gradcentral.layout.shapes import weights

__all__ = ["CONVOLUTIONS", "TABLE"]

CONVOLUTIONS = ("*.DeformConv2d",)

TABLE: LibraryTable = {
    "*.DeformConv2d": {"weight": weights("o i i i", o="out_channels")},
    "*.PositionalEncoding": {"*_pos": POSITION},
    "*": NAMES,
}
