"""Hugging Face diffusers, as of version 0.42."""

import gradcentral.layout.reasons as skip
from gradcentral.layout.libraries.transformers import experts
from gradcentral.layout.reasons import each
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes

TABLE: LibraryTable = {
    "*.SwiGLUExperts": experts(transposed=True),
    "*.MoEGate": {"weight": axes("o [i]", o="n_routed_experts", i="gating_dim")},
    "*.MotionConv2d": {"weight": axes("o [i k k]")},
    "*.MotionLinear": {"weight": axes("o [i]")},
    "*.SanaWMTemporalShortConvolution": {"weight": axes("o [i k]")},
    "*.LocalFacialExtractor": {"proj_out": axes("[i] o")},
    "*.WanAnimateMotionEncoder": {"motion_synthesis_weight": LeaveAlone("orthogonalized before use")},
    "*.MiniMaxMusic3FourierEmbedding": {"weight": LeaveAlone("random Fourier frequencies")},
    "quantizers.*": {"*": LeaveAlone("storage of a quantized layer")},
    **each({"gamma": skip.NORM_GAIN, "beta": skip.NORM_GAIN}, "*Norm *GRN"),
    "*_norm": {"gamma": skip.NORM_GAIN, "bias": skip.NORM_GAIN},
    "*Snake*": {"alpha": skip.ACTIVATION, "beta": skip.ACTIVATION},
    "*": {
        **skip.NAMES,
        **each(skip.SCALE, "per_channel_scale* modulat* scale clip_mean clip_std mean std"),
        **each(skip.TOKEN, "*embed embeddings *_emb *_embedding uncond_vector text_embedding_padding"),
        "pos_frequencies": skip.POSITION,
        "latent_queries": skip.QUERY,
        "*_embeds": skip.LOOKUP,
        "A_log": skip.DYNAMICS,
    },
}
