"""timm, PyTorch image models, as of version 1.0.31."""

import math

from torch import Tensor, nn

import gradcentral.layout.reasons as skip
from gradcentral.layout.reasons import each
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes, unexpected_shape


def _conditional_convolution(module: nn.Module, tensor: Tensor) -> str | LeaveAlone:
    """Return the pattern for [experts, out · in/groups · k · k]: each expert is a whole convolution, flattened."""
    shape = getattr(module, "weight_shape", None)
    if tensor.ndim != 2 or not isinstance(shape, tuple) or math.prod(shape) != tensor.shape[1]:
        return unexpected_shape(module, tensor, f"[experts, elements of weight_shape = {shape}]")
    units, *inputs = map(str, shape)
    return f"e ({units} [{' '.join(inputs)}])"


TABLE: LibraryTable = {
    "*.CondConv2d": {"weight": _conditional_convolution},
    "*.ScaledStdConv2d*": {"gain": LeaveAlone("gain of a standardized weight")},
    "*.MultiQueryAttentionV2": {
        "query_proj": axes("h o [i]", h="num_heads"),
        "key_proj": axes("[i] o", o="key_dim"),
        "value_proj": axes("[i] o", o="value_dim"),
        "out_proj": axes("o [h i]"),
    },
    "*.MLDecoder": {"duplicate_pooling": axes("g [i] o", o="duplicate_factor")},
    "*.EfficientAdditiveAttention": {"w_g": axes("[i] o")},
    "*GlobalResponseNorm": {"weight": skip.NORM_GAIN},
    "*.EfficientViM*": {"alpha": skip.SCALE, "weights*": skip.MIXING},
    "*.HSMSSD": {"A": skip.DYNAMICS, "D": skip.DYNAMICS},
    "*.PosEmbedRel": {"*_rel": skip.RELATIVE},
    "*.RotaryEmbeddingMixed": {"freqs": LeaveAlone("frequencies of a rotary embedding")},
    "*.Affine": {"alpha": skip.SCALE, "beta": skip.SCALE},
    "*.Scale": {"scale": skip.SCALE},
    "*": {
        **skip.NAMES,
        **each(skip.POSITION, "patch_pos pixel_pos"),
        "latent": skip.QUERY,
        "skipinit_gain": skip.SCALE,
    },
}
