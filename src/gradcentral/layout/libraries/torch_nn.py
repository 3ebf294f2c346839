"""The layers of torch.nn. The tests verify each rule numerically by theorem 4.1 of the paper.

The sizes distinguish a subclass that stores its weights in another order, such as a Linear with [in, out]. They are not
compared in a layer of torch.nn itself, which ignores them: a longer or shorter weight is often assigned to it.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.parametrize import type_before_parametrizations

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import (
    Decision,
    LeaveAlone,
    Rule,
    Rules,
    apply_rule,
    axes,
    size_of,
    unexpected_shape,
    unexpected_sizes,
)
from gradcentral.transposed_taps import SPLIT, Taps, taps_of
from gradcentral.weight_vectors import WeightVectors


def _ignores_sizes(module: nn.Module) -> bool:
    """Return whether torch.nn's own forward computes with the weight, whatever sizes the module stores."""
    cls = type_before_parametrizations(module)
    return cls.__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)


def _axes(pattern: str, **sizes: str) -> Rule:
    sized, free = axes(pattern, **sizes), axes(pattern)
    return lambda module, tensor: apply_rule(free if _ignores_sizes(module) else sized, module, tensor)


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
    if _ignores_sizes(module) or size is None or tensor.shape[-1:] == (size,):
        return skip.LOOKUP
    return unexpected_shape(module, tensor, f"rows of embedding_dim = {size}")


def _taps(module: nn.Module, tensor: Tensor) -> list[Taps]:
    settings = [getattr(module, name) for name in ("kernel_size", "stride", "dilation")]
    if _ignores_sizes(module):
        settings[0] = tuple(tensor.shape[2:])
    # torch's functions accept one number for all axes, so code may have assigned one to the module.
    settings = [value if isinstance(value, tuple) else (value,) * (tensor.ndim - 2) for value in settings]
    return taps_of(*settings)


def has_uneven_phases(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether this is a transposed convolution whose outputs differ in the number of taps that reach them."""
    return isinstance(module, _ConvTransposeNd) and any(taps.is_uneven for taps in _taps(module, tensor))


def _transposed_convolution(module: nn.Module, tensor: Tensor) -> Decision:
    """Return one weight vector per output channel and phase: the input channels of its group, and the phase's taps.

    Along an axis with uneven phases, a weight vector runs over the taps of all phases.
    """
    attributes = {"g": "groups", "i": "in_channels/groups", "o": "out_channels/groups"}
    if _ignores_sizes(module):
        attributes = {"g": "groups"}
    sizes = {name: size for name, attribute in attributes.items() if (size := size_of(module, attribute)) is not None}
    try:
        taps = _taps(module, tensor)
        split = [axis for axis in taps if axis.pattern == SPLIT]
        return WeightVectors.parse(
            " ".join(["(g [i]) o", *(axis.pattern for axis in taps)]),
            tensor.shape,
            **sizes,
            k=[axis.size for axis in taps if axis not in split],
            m=[axis.size // axis.phases for axis in split],
            s=[axis.phases for axis in split],
        )
    except (ValueError, AttributeError):  # a traced or exported module has lost its settings
        return unexpected_sizes(module, tensor, "(g [i]) o k...", {**attributes, "k": "kernel_size"})


_NORM: Rules = {"weight": skip.NORM_GAIN, "bias": skip.BIAS}

TABLE: dict[type[nn.Module], Rules] = {
    nn.Linear: {"weight": _axes("o [i]", o="out_features", i="in_features"), "bias": skip.BIAS},
    nn.Bilinear: {
        "weight": _axes("o [i j]", o="out_features", i="in1_features", j="in2_features"),
        "bias": skip.BIAS,
    },
    # With groups, axis i of a convolution holds in/groups channels, so that a whole filter is one weight vector.
    _ConvNd: {
        "weight": _axes("o [i k...]", o="out_channels", i="in_channels/groups", k="kernel_size"),
        "bias": skip.BIAS,
    },
    _ConvTransposeNd: {"weight": _transposed_convolution, "bias": skip.BIAS},
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
