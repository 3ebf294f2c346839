"""The layers of torch.nn, and what wraps their weights: parametrizations, weight_norm, spectral_norm, pruning.

Each layout is checked numerically by the paper's theorem in the tests.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradcentral.layout.libraries.reasons import BIAS, LOOKUP, NORM_GAIN
from gradcentral.layout.rules import Decision, LeaveAlone, Rules, Table
from gradcentral.layout.shapes import unexpected_shape, weights
from gradcentral.weight_vectors import WeightVectors

__all__ = ["CONVOLUTIONS", "TABLE", "unwrap", "unwrap_parametrization"]

CONVOLUTIONS: tuple[type[nn.Module], ...] = (_ConvNd,)


def _convolution(module: nn.Module, tensor: Tensor) -> Decision:
    """[out, in/groups, k…]: a filter, with any number of groups."""
    assert isinstance(module, _ConvNd)
    ndim = 2 + len(module.kernel_size)
    if tensor.ndim != ndim:
        return unexpected_shape(module, tensor, f"{ndim} axes")
    return WeightVectors(span=tuple(range(1, ndim)))


def _transposed_convolution(module: nn.Module, tensor: Tensor) -> Decision:
    """[in, out/groups, k…]: output channel (group, o) is fed by the input channels of its own group only."""
    assert isinstance(module, _ConvNd)
    groups, ndim = module.groups, 2 + len(module.kernel_size)
    if tensor.ndim != ndim or tensor.shape[0] % groups:
        return unexpected_shape(module, tensor, f"{ndim} axes, the first a multiple of groups={groups}")
    if groups == 1:
        return WeightVectors(span=(0, *range(2, ndim)))
    channels_in, channels_out, *taps = tensor.shape
    view = (groups, channels_in // groups, channels_out, *taps)
    return WeightVectors(span=(1, *range(3, ndim + 1)), view=view)


_NORM: Rules = {"weight": NORM_GAIN, "bias": BIAS}
_LOOKUP: Rules = {"weight": LOOKUP}

TABLE: Table = {
    nn.Linear: {"weight": weights("o i"), "bias": BIAS},
    nn.Bilinear: {"weight": weights("o i i"), "bias": BIAS},
    _ConvNd: {"weight": _convolution, "bias": BIAS},
    _ConvTransposeNd: {"weight": _transposed_convolution, "bias": BIAS},
    RNNBase: {"weight_*": weights("o i"), "bias_*": BIAS},
    RNNCellBase: {"weight_*": weights("o i"), "bias_*": BIAS},
    nn.MultiheadAttention: {
        "in_proj_weight": weights("o i"),
        "[qkv]_proj_weight": weights("o i"),
        "in_proj_bias": BIAS,
        "bias_[kv]": LeaveAlone("an extra key or value token"),
    },
    nn.Embedding: _LOOKUP,
    nn.EmbeddingBag: _LOOKUP,
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    _NormBase: _NORM,
    nn.PReLU: {"weight": LeaveAlone("slope of an activation")},
}


def unwrap(module: nn.Module, name: str) -> tuple[str, LeaveAlone | None] | None:
    """For a parameter that stands for another (``weight_v``, ``weight_orig``): the tensor's name in its module.

    Returns:
        The name whose rule applies, and the reason to leave the parameter alone nevertheless; None if the
        parameter stands for itself.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            if name == f"{hook.name}_g":
                return hook.name, LeaveAlone("magnitude of weight_norm")
            if name == f"{hook.name}_v":
                return hook.name, None
        elif isinstance(hook, SpectralNorm) and name == f"{hook.name}_orig":
            return hook.name, None
        elif isinstance(hook, BasePruningMethod) and name == f"{hook._tensor_name}_orig":
            # Its weight vector is the unmasked entries, which no view of the tensor describes.
            return hook._tensor_name, LeaveAlone("pruned: the mean would run over masked entries too")
    return None


def unwrap_parametrization(parametrizations_of: ParametrizationList, name: str) -> LeaveAlone | None:
    """Reason to leave alone ``original…`` of a parametrized tensor; None where the tensor's own rule applies."""
    kinds = [type(step).__name__ for step in parametrizations_of]
    if len(kinds) == 1:
        step = parametrizations_of[0]
        if isinstance(step, parametrizations._WeightNorm):
            return None if name == "original1" else LeaveAlone("magnitude of weight_norm")
        if isinstance(step, parametrizations._SpectralNorm):
            return None
        if isinstance(step, parametrizations._Orthogonal):
            return LeaveAlone("orthogonal: the weight is no linear function of the parameter")
    return LeaveAlone(f"parametrized by {', '.join(kinds)}", unknown=True)
