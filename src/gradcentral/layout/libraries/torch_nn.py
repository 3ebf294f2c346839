"""The layers of torch.nn. The tests verify each rule numerically by theorem 4.1 of the paper."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, Rules, axes

_NORM: Rules = {"weight": skip.NORM_GAIN, "bias": skip.BIAS}

TABLE: dict[type[nn.Module], Rules] = {
    nn.Linear: {"weight": axes("o [i]"), "bias": skip.BIAS},
    nn.Bilinear: {"weight": axes("o [i i]"), "bias": skip.BIAS},
    # With groups, axis i of a convolution holds in/groups channels, so that a whole filter is one weight vector.
    _ConvNd: {"weight": axes("o [i k...]", k="kernel_size"), "bias": skip.BIAS},
    # A transposed convolution stores all input channels; those of other groups do not reach an output channel.
    _ConvTransposeNd: {"weight": axes("(g [i]) o [k...]", g="groups", k="kernel_size"), "bias": skip.BIAS},
    RNNBase: {"weight_*": axes("o [i]"), "bias_*": skip.BIAS},
    RNNCellBase: {"weight_*": axes("o [i]"), "bias_*": skip.BIAS},
    nn.MultiheadAttention: {
        "in_proj_weight": axes("o [i]"),
        "[qkv]_proj_weight": axes("o [i]"),
        "in_proj_bias": skip.BIAS,
        "bias_[kv]": LeaveAlone("an additional key or value token"),
    },
    nn.Embedding: {"weight": skip.LOOKUP},
    nn.EmbeddingBag: {"weight": skip.LOOKUP},
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    _NormBase: _NORM,
    nn.PReLU: {"weight": LeaveAlone("slope of an activation")},
}
