"""Hugging Face diffusers. Read in version 0.42."""

from __future__ import annotations

from gradcentral.layout.libraries.experts import experts
from gradcentral.layout.libraries.reasons import (
    ACTIVATION,
    DYNAMICS,
    LOOKUP,
    NAMES,
    NORM_GAIN,
    POSITION,
    QUERY,
    SCALE,
    TOKEN,
)
from gradcentral.layout.rules import LeaveAlone, LibraryTable
from gradcentral.layout.shapes import weights

__all__ = ["CONVOLUTIONS", "TABLE"]

CONVOLUTIONS = ("*.MotionConv2d", "*.SanaWMTemporalShortConvolution")

TABLE: LibraryTable = {
    "*.SwiGLUExperts": experts(transposed=True),
    "*.MoEGate": {"weight": weights("o i", o="n_routed_experts", i="gating_dim")},
    "*.MotionConv2d": {"weight": weights("o i i i")},
    "*.MotionLinear": {"weight": weights("o i")},
    "*.SanaWMTemporalShortConvolution": {"weight": weights("o i i")},
    "*.LocalFacialExtractor": {"proj_out": weights("i o")},
    "*.WanAnimateMotionEncoder": {"motion_synthesis_weight": LeaveAlone("orthogonalized before use")},
    "*.MiniMaxMusic3FourierEmbedding": {"weight": LeaveAlone("random Fourier frequencies")},
    "quantizers.*": {"*": LeaveAlone("storage of a quantized layer")},
    "*Norm": {"gamma": NORM_GAIN, "beta": NORM_GAIN},
    "*_norm": {"gamma": NORM_GAIN, "bias": NORM_GAIN},
    "*GRN": {"gamma": NORM_GAIN, "beta": NORM_GAIN},
    "*Snake*": {"alpha": ACTIVATION, "beta": ACTIVATION},
    "*": {
        **NAMES,
        "per_channel_scale*": SCALE,
        "modulat*": SCALE,
        "scale": SCALE,
        "clip_mean": SCALE,
        "clip_std": SCALE,
        "mean": SCALE,
        "std": SCALE,
        "latent_queries": QUERY,
        "*embed": TOKEN,
        "*_embeds": LOOKUP,
        "embeddings": TOKEN,
        "*_emb": TOKEN,
        "A_log": DYNAMICS,
        "*_embedding": TOKEN,
        "uncond_vector": TOKEN,
        "text_embedding_padding": TOKEN,
        "pos_frequencies": POSITION,
        "*pos_emb_*": POSITION,
        "learnable_positional_embedding": POSITION,
    },
}
