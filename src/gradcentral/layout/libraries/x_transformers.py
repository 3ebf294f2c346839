"""x-transformers, as of version 2.31."""

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes

_MEMORY = LeaveAlone("memory read by attention, not the weights of a unit")

TABLE: LibraryTable = {
    "*.LowRankLinear": {"weight_[ab]": axes("o [i]")},
    "*.NeoMLP": {"to_output_weights": axes("o [i]"), "*_embed": skip.TOKEN},
    "*.TPREncoder": {"binding": axes("o [i i]")},
    "*HyperConnection": {"dynamic_alpha_fn": axes("[i] o"), "static_alpha": skip.MIXING},
    "*.GatedMultiResidual": {"read_gain": skip.SCALE, "static_*_logit": skip.MIXING},
    "*.RelativeProjPositionalBias": {"distance_bank": skip.RELATIVE},
    "*.MultiheadRMSNorm": {"gamma": skip.NORM_GAIN},
    "*.TransformerWrapper": {"ff_deep_embed": skip.LOOKUP},
    "*.Attention": {"mem_[kv]": _MEMORY, "qk_norm_*_scale": skip.SCALE, "head_scale_params": skip.SCALE},
    "*.EpisodicMemories": {"mem_kv": _MEMORY},
    "*": {**skip.NAMES, "stream_emb": skip.TOKEN, "queries": skip.TOKEN},
}
