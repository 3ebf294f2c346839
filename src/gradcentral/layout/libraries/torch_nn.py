"""The layers of torch.nn. The tests verify each rule numerically by theorem 4.1 of the paper.

The sizes distinguish a subclass that stores its weights in another order, such as a Linear with [in, out].
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, Rules, axes, unexpected_shape


def _of_state(module: nn.Module, tensor: Tensor, *, both_directions: bool = False) -> str | LeaveAlone:
    """Return the pattern for weights that receive the hidden state of their own layer or of the one below."""
    size = getattr(module, "proj_size", 0) or getattr(module, "hidden_size", None)
    if both_directions and size and getattr(module, "bidirectional", False):
        size *= 2
    if tensor.ndim == 2 and size in (None, tensor.shape[1]):
        return "o [i]"
    return unexpected_shape(module, tensor, f"'o [i]' with i = {size}")


def _lookup(module: nn.Module, tensor: Tensor) -> LeaveAlone:
    # The number of rows is not compared, since a vocabulary is often extended by assigning a longer table.
    size = getattr(module, "embedding_dim", None)
    if size is None or tensor.shape[-1:] == (size,):
        return skip.LOOKUP
    return unexpected_shape(module, tensor, f"rows of embedding_dim = {size}")


_NORM: Rules = {"weight": skip.NORM_GAIN, "bias": skip.BIAS}

TABLE: dict[type[nn.Module], Rules] = {
    nn.Linear: {"weight": axes("o [i]", o="out_features", i="in_features"), "bias": skip.BIAS},
    nn.Bilinear: {
        "weight": axes("o [i j]", o="out_features", i="in1_features", j="in2_features"),
        "bias": skip.BIAS,
    },
    # With groups, axis i of a convolution holds in/groups channels, so that a whole filter is one weight vector.
    _ConvNd: {
        "weight": axes("o [i k...]", o="out_channels", i="in_channels/groups", k="kernel_size"),
        "bias": skip.BIAS,
    },
    # A transposed convolution stores all input channels; those of other groups do not reach an output channel.
    _ConvTransposeNd: {
        "weight": axes(
            "(g [i]) o [k...]", g="groups", i="in_channels/groups", o="out_channels/groups", k="kernel_size"
        ),
        "bias": skip.BIAS,
    },
    RNNBase: {
        "weight_ih_l0*": axes("o [i]", i="input_size"),
        "weight_ih_*": partial(_of_state, both_directions=True),
        "weight_hh_*": _of_state,
        "weight_hr_*": axes("o [i]", o="proj_size", i="hidden_size"),
        "bias_*": skip.BIAS,
    },
    RNNCellBase: {
        "weight_ih": axes("o [i]", i="input_size"),
        "weight_hh": axes("o [i]", i="hidden_size"),
        "bias_*": skip.BIAS,
    },
    nn.MultiheadAttention: {
        "in_proj_weight": axes("o [i]", i="embed_dim"),
        "q_proj_weight": axes("o [i]", o="embed_dim", i="embed_dim"),
        "k_proj_weight": axes("o [i]", o="embed_dim", i="kdim"),
        "v_proj_weight": axes("o [i]", o="embed_dim", i="vdim"),
        "in_proj_bias": skip.BIAS,
        "bias_[kv]": LeaveAlone("an additional key or value token"),
    },
    nn.Embedding: {"weight": _lookup},
    nn.EmbeddingBag: {"weight": _lookup},
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    _NormBase: _NORM,
    nn.PReLU: {"weight": LeaveAlone("slope of an activation")},
}
