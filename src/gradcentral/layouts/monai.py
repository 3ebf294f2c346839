"""MONAI. Read in version 1.6."""

from __future__ import annotations

from gradcentral.layouts.reasons import MIXING, NAMES, NORM_GAIN, POSITION, RELATIVE
from gradcentral.layouts.rules import LeaveAlone, LibraryTable
from gradcentral.layouts.shapes import weights

__all__ = ["TABLE"]

TABLE: LibraryTable = {
    "*.LLTM": {"weights": weights("o i")},
    "*.TopologySearch": {"log_alpha_*": MIXING},
    "*.DecomposedRelativePosEmbedding": {"rel_pos_arr.*": RELATIVE},
    "*.NaViT": {"pos_embed_axes.*": POSITION},
    "*.GaussianFilter": {"*sigma*": LeaveAlone("width of a Gaussian filter")},
    "*": {**NAMES, "global_resp_*": NORM_GAIN},
}
