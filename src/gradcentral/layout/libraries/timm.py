"""timm, PyTorch image models. Read in version 1.0.31."""

from __future__ import annotations

import math

from torch import Tensor, nn

from gradcentral.layout.libraries.reasons import (
    BIAS,
    DYNAMICS,
    MIXING,
    NAMES,
    NORM_GAIN,
    POSITION,
    QUERY,
    RELATIVE,
    SCALE,
    TEMPERATURE,
)
from gradcentral.layout.rules import Decision, LeaveAlone, LibraryTable
from gradcentral.layout.shapes import unexpected_shape, weights
from gradcentral.weight_vectors import WeightVectors

__all__ = ["CONVOLUTIONS", "TABLE"]


def _conditional_convolution(module: nn.Module, tensor: Tensor) -> Decision:
    """[experts, out · in/groups · k · k]: every expert is a whole convolution, flattened."""
    shape = getattr(module, "weight_shape", None)
    if tensor.ndim != 2 or not isinstance(shape, tuple) or math.prod(shape) != tensor.shape[1]:
        return unexpected_shape(module, tensor, f"[experts, elements of weight_shape = {shape}]")
    return WeightVectors(span=tuple(range(2, 1 + len(shape))), view=(tensor.shape[0], *shape))


CONVOLUTIONS = ("*.CondConv2d",)

TABLE: LibraryTable = {
    "*.CondConv2d": {"weight": _conditional_convolution, "bias": BIAS},
    "*.ScaledStdConv2d*": {"gain": LeaveAlone("gain of a standardized weight")},
    "*.MultiQueryAttentionV2": {
        "query_proj": weights("o o i", o="num_heads"),
        "key_proj": weights("i o", o="key_dim"),
        "value_proj": weights("i o", o="value_dim"),
        "out_proj": weights("o i i"),
    },
    "*.MLDecoder": {"duplicate_pooling": weights("g i o", o="duplicate_factor")},
    "*.EfficientAdditiveAttention": {"w_g": weights("i o")},
    "*GlobalResponseNorm": {"weight": NORM_GAIN},
    "*.EfficientViM*": {"alpha": SCALE, "weights*": MIXING},
    "*.HSMSSD": {"A": DYNAMICS, "D": DYNAMICS},
    "*.PosEmbedRel": {"*_rel": RELATIVE},
    "*.RotaryEmbeddingMixed": {"freqs": LeaveAlone("frequencies of a rotary embedding")},
    "*.Affine": {"alpha": SCALE, "beta": SCALE},
    "*.Scale": {"scale": SCALE},
    "*": {
        **NAMES,
        "latent": QUERY,
        "patch_pos": POSITION,
        "pixel_pos": POSITION,
        "skipinit_gain": SCALE,
        "logit_scale": TEMPERATURE,
    },
}
