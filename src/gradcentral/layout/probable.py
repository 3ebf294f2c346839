"""Probable weight vectors of layers that many projects copy, found by the names of their classes.

They appear only in suggestions, since a class of the same name may use its weights in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from gradcentral.layout.reasons import each
from gradcentral.weight_vectors import WeightVectors

__all__ = ["probable_pattern"]

Patterns: TypeAlias = "Mapping[str, tuple[str, ...]]"

# The attributes that hold the size of an axis, in the order of preference. A one-dimensional bias has one element per
# output.
_SIZES = {
    "o": ("out_features", "out_channels", "out_channel", "out_planes", "out_dim", "outdim", "nf", "bias"),
    "i": ("in_features", "in1_features", "in_channels", "in_channel", "in_planes", "in_dim", "inputdim", "nx"),
    "j": ("in2_features",),
    "k": ("kernel_size",),
    "z": ("z_dim",),
}
_LINEAR = ("o [i]", "[i] o")
_CONVOLUTION = ("o [i k...]", "[k... i] o")
_CONVOLUTION_2D: Patterns = {"weight": ("o [i k k]",)}
_BAYESIAN: Patterns = each(("o [i]", "o [i k]", "o [i k k]", "o [i k k k]"), "weight_mu mu_weight W_mu mu_kernel")

# {class: {parameter: patterns}}, with wildcards. A pattern is suggested if it is the only one that fits.
_PATTERNS: Mapping[str, Patterns] = {
    # Kolmogorov–Arnold networks: a unit sums over inputs and basis functions.
    "KANLinear": {"base_weight": ("o [i]",), "spline_weight": ("o [i b]",)},
    "KANLayer": {"coef": ("[i] o [b]",)},
    "ChebyKANLayer": {"cheby_coeffs": ("[i] o [b]",)},
    "NaiveFourierKANLayer": {"fouriercoeffs": ("[2] o [i b]",)},
    # StyleGAN: weights scaled at run time; the first axis of a modulated convolution is for the batch.
    "Equal*Linear": {"weight": ("o [i]",)},
    "Equal*Conv2d": _CONVOLUTION_2D,
    "FullyConnectedLayer": {"weight": _LINEAR},
    "ModulatedConv2d": {"weight": ("1 o [i k k]", "o [i k k]")},
    **each(_CONVOLUTION_2D, "Conv2DMod Conv2dLayer SynthesisLayer ToRGBLayer"),
    # Fourier neural operators: one matrix per mode.
    "SpectralConv1d*": {"weight*": ("[i] o m", "[i] o m 2")},
    "SpectralConv2d*": {"weight*": ("[i] o m m", "[i] o m m 2")},
    "SpectralConv3d*": {"weight*": ("[i] o m m m", "[i] o m m m 2")},
    # Noisy and Bayesian layers: the means are used as weights.
    **each(_BAYESIAN, "Noisy* *Bayes* BBB* *Reparameterization* *Flipout*"),
    # Graphs.
    "GraphConvolution*": {"weight": ("[i] o",)},
    "GraphAttentionLayer": {"W": ("[i] o",), "a": ("[p] 1",)},
    "SpGraphAttentionLayer": {"W": ("[i] o",), "a": ("1 [p]",)},
    # GPT and early BERT code.
    "Conv1D": {"w": ("[i] o",), "weight": ("[i] o",)},
    # Capsules: an output capsule sums over the input capsules (r) and their elements (d).
    "DigitCaps": {"W": ("1 [r] c e [d]",)},
    "CapsuleLayer": {"route_weights": ("c [r d] e",)},
    "DenseCapsule": {"weight": ("c [r] e [d]",)},
    # Mixtures of experts: used with bmm or einsum, or transposed first.
    **each({"w[123]": ("e [i] o",)}, "Experts *MoE* *MixtureOfExperts*"),
    "GroupedExperts": {"w[123]": ("e o [i]",)},
    # Mixtures of kernels, kernels per position, and generators of kernels.
    **each({"weight": ("e o [i k...]",)}, "Dynamic_conv?d DynamicConv?d"),
    "LocallyConnected2d": {"weight": ("1 o [i] y x [t]",)},
    "HyperNetwork": {"w[12]": ("[z] o",)},
    # Layers of torch.nn whose weights are stored in another order, or scaled by a hook as in ProGAN.
    "Linear": {"weight": _LINEAR, "weight_orig": _LINEAR},
    "Bilinear": {"weight": ("o [i j]", "[i j] o")},
    "Conv[123]d": {"weight": _CONVOLUTION, "weight_orig": _CONVOLUTION},
}


def probable_pattern(module: nn.Module, cls: type[nn.Module], name: str, tensor: Tensor) -> str:
    """Return the pattern that a parameter of a well-known class usually has, or an empty string.

    The pattern fits the shape and the sizes that the module stores.
    """
    for base in cls.__mro__:
        for known, patterns in _PATTERNS.items():
            if fnmatchcase(base.__name__, known):
                for parameter, choices in patterns.items():
                    if fnmatchcase(name, parameter):
                        fitting = [pattern for pattern in choices if _fits(pattern, module, tensor)]
                        return fitting[0] if len(fitting) == 1 else ""
    return ""


def _fits(pattern: str, module: nn.Module, tensor: Tensor) -> bool:
    sizes = {axis: size for axis in _SIZES if axis in pattern and (size := _size(module, axis, pattern))}
    try:
        return WeightVectors.parse(pattern, tuple(tensor.shape), **sizes).fan_in > 1
    except ValueError:
        return False


def _size(module: nn.Module, axis: str, pattern: str) -> int | tuple[int, ...] | None:
    for attribute in _SIZES[axis]:
        size = getattr(module, attribute, None)
        if isinstance(size, Tensor) and size.ndim == 1:
            return size.numel()
        if isinstance(size, tuple) and f"{axis}..." in pattern:
            return size
        if isinstance(size, int) and not isinstance(size, bool):
            groups = getattr(module, "groups", 1) if axis == "i" and "k" in pattern else 1
            return size // groups if isinstance(groups, int) else None
    return None
