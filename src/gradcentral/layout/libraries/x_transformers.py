"""x-transformers. Read in version 2.31."""

from __future__ import annotations

from gradcentral.layout.libraries.reasons import LOOKUP, MIXING, NAMES, NORM_GAIN, POSITION, RELATIVE, SCALE, TOKEN
from gradcentral.layout.rules import LeaveAlone, LibraryTable
from gradcentral.layout.shapes import weights

__all__ = ["TABLE"]

_MEMORY = LeaveAlone("memory that attention reads, no unit's weights")

TABLE: LibraryTable = {
    "*.LowRankLinear": {"weight_[ab]": weights("o i")},
    "*.NeoMLP": {"to_output_weights": weights("o i"), "*_embed": TOKEN},
    "*.TPREncoder": {"binding": weights("o i i")},
    "*HyperConnection": {"dynamic_alpha_fn": weights("i o"), "static_alpha": MIXING},
    "*.GatedMultiResidual": {"read_gain": SCALE, "static_*_logit": MIXING},
    "*.RelativeProjPositionalBias": {"distance_bank": RELATIVE},
    "*.MultiheadRMSNorm": {"gamma": NORM_GAIN},
    "*.TransformerWrapper": {"ff_deep_embed": LOOKUP},
    "*.Attention": {"mem_[kv]": _MEMORY, "qk_norm_*_scale": SCALE, "head_scale_params": SCALE},
    "*.EpisodicMemories": {"mem_kv": _MEMORY},
    "*": {**NAMES, "stream_emb": TOKEN, "queries": TOKEN, "pos_emb": POSITION},
}
