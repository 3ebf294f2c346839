"""MONAI. Read in version 1.6."""

from __future__ import annotations

from gradcentral.layout.libraries.reasons import MIXING, NAMES, NORM_GAIN, POSITION, RELATIVE
from gradcentral.layout.rules import LeaveAlone, LibraryTable
from gradcentral.layout.shapes import weights

__all__ = ["TABLE"]

TABLE: LibraryTable = {
    "*.LLTM": {"weights": weights("o i")},
    "*.TopologySearch": {"log_alpha_*": MIXING},
    "*.DecomposedRelativePosEmbedding": {"rel_pos_arr.*": RELATIVE},
    "*.NaViT": {"pos_embed_axes.*": POSITION},
    "*.GaussianFilter": {"*sigma*": LeaveAlone("width of a Gaussian filter")},
    "*": {**NAMES, "global_resp_*": NORM_GAIN},
}
