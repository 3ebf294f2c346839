"""torchvision, as of version 0.28."""

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LibraryTable, axes

TABLE: LibraryTable = {
    "*.DeformConv2d": {"weight": axes("o [i k k]", o="out_channels")},
    "*.PositionalEncoding": {"*_pos": skip.POSITION},
    "*": skip.NAMES,
}
