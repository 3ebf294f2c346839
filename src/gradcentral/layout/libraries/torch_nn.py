"""The layers of torch.nn. The tests verify each rule numerically by theorem 4.1 of the paper."""

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import Decision, LeaveAlone, Rules, axes, unexpected_shape
from gradcentral.weight_vectors import WeightVectors

_SPLIT = "([m] s)"


class _Taps(NamedTuple):
    """One axis of the kernel of a transposed convolution."""

    size: int
    phases: int
    """An input at n reaches the outputs n · stride + t · dilation through the taps t. So the taps that reach one output
    are those of one phase: they are equal modulo stride / gcd(stride, dilation)."""

    @property
    def pattern(self) -> str:
        if self.phases == 1 or self.is_uneven:
            return "[k]"
        return _SPLIT if self.size > self.phases else "k"

    @property
    def is_uneven(self) -> bool:
        """Whether some phases have more taps than others; no view describes weight vectors of unequal sizes."""
        return self.size > self.phases and self.size % self.phases != 0


def _taps(module: nn.Module, tensor: Tensor) -> list[_Taps]:
    settings = [getattr(module, name) for name in ("kernel_size", "stride", "dilation")]
    # torch's functions accept one number for all axes, so code may have assigned one to the module.
    settings = [value if isinstance(value, tuple) else (value,) * (tensor.ndim - 2) for value in settings]
    return [_Taps(size, stride // math.gcd(stride, dilation)) for size, stride, dilation in zip(*settings, strict=True)]


def has_uneven_phases(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether this is a transposed convolution whose outputs differ in the number of taps that reach them."""
    return isinstance(module, _ConvTransposeNd) and any(taps.is_uneven for taps in _taps(module, tensor))


def _transposed_convolution(module: nn.Module, tensor: Tensor) -> Decision:
    """Return one weight vector per output channel and phase: the input channels of its group, and the phase's taps.

    Along an axis with uneven phases, a weight vector runs over the taps of all phases.
    """
    groups, kernel_size = getattr(module, "groups", 1), getattr(module, "kernel_size", None)
    try:
        taps = _taps(module, tensor)
        split = [axis for axis in taps if axis.pattern == _SPLIT]
        return WeightVectors.parse(
            " ".join(["(g [i]) o", *(axis.pattern for axis in taps)]),
            tensor.shape,
            g=groups,
            k=[axis.size for axis in taps if axis not in split],
            m=[axis.size // axis.phases for axis in split],
            s=[axis.phases for axis in split],
        )
    except ValueError:
        expected = f"'(g [i]) o k...' with g = groups = {groups}, k = kernel_size = {kernel_size}"
        return unexpected_shape(module, tensor, expected)


_NORM: Rules = {"weight": skip.NORM_GAIN, "bias": skip.BIAS}

TABLE: dict[type[nn.Module], Rules] = {
    nn.Linear: {"weight": axes("o [i]"), "bias": skip.BIAS},
    nn.Bilinear: {"weight": axes("o [i i]"), "bias": skip.BIAS},
    # With groups, axis i of a convolution holds in/groups channels, so that a whole filter is one weight vector.
    _ConvNd: {"weight": axes("o [i k...]", k="kernel_size"), "bias": skip.BIAS},
    _ConvTransposeNd: {"weight": _transposed_convolution, "bias": skip.BIAS},
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
