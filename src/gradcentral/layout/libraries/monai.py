"""MONAI, as of version 1.6."""

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes

TABLE: LibraryTable = {
    "*.LLTM": {"weights": axes("o [i]")},
    "*.TopologySearch": {"log_alpha_*": skip.MIXING},
    "*.DecomposedRelativePosEmbedding": {"rel_pos_arr.*": skip.RELATIVE},
    "*.NaViT": {"pos_embed_axes.*": skip.POSITION},
    "*.GaussianFilter": {"*sigma*": LeaveAlone("width of a Gaussian filter")},
    "*": {**skip.NAMES, "global_resp_*": skip.NORM_GAIN},
}
