"""The layers of Flax, Equinox and Haiku; the tests verify each rule by the elements that reach one output.

Flax and Haiku store [in, out] and [kernel…, in, out], Equinox [out, in] and [out, in, kernel…].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from gradcentral.integrations.named_layout import Found, Rule, Skip
from gradcentral.transposed_taps import taps_of
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Axes", "decision", "in_front"]


class Axes(NamedTuple):
    """The weight vectors of a layer's own parameter, and its shape, where None is a size that the layer does not tell.

    A parameter with more axes in front holds several such layers, one in each slice.
    """

    pattern: str
    shape: tuple[int | None, ...]


LayerRule: TypeAlias = "Axes | Skip | Callable[[Any], Axes | Skip]"

BIAS = Skip("bias")
LOOKUP = Skip("lookup table: a row is the vector of one token, not the weights of a unit")
NORM_GAIN = Skip("gain of a normalization")
SLOPE = Skip("slope of an activation")
STATE = Skip("state, not a parameter")
_ONE = Axes("[i] o", (None, None))


def in_front(axes: Axes, shape: tuple[int, ...]) -> Rule:
    """Return the pattern for a parameter of this shape, in which axes in front of the layer's own are units."""
    count = len(shape) - len(axes.shape)
    if count < 0 or any(own not in (None, size) for own, size in zip(axes.shape, shape[count:], strict=True)):
        sizes = ", ".join("?" if size is None else str(size) for size in axes.shape)
        return Skip(f"shape {shape} does not fit its layer: expected ({sizes}), or that after other axes", unknown=True)
    return " ".join(["l"] * count + [axes.pattern])


def decision(module: Any, name: str, path: str, shape: tuple[int, ...], own: tuple[int, ...] | None = None) -> Found:
    """Decide about a parameter of a module by the rule for its class, or for the nearest of its bases that has one.

    Args:
        module: the module that owns the parameter.
        name: the parameter's name in the module.
        path: its name in the model.
        shape: its shape in the model.
        own: its shape in the layer itself, if that is known, as where a layer has been repeated by a transformation.
    """
    kind = type(module)
    for cls in kind.__mro__:
        if (declared := _declared(cls, name)) is not None:
            return Found(path, shape, declared[0], f"{cls.__name__}.weight_vectors")
        library, table = _table_of(cls)
        rules = table.get(cls.__name__, {})
        for key, rule in rules.items():
            if fnmatchcase(name, key):
                decided = rule(module) if callable(rule) and not isinstance(rule, tuple) else rule
                origin = f"{library} {cls.__name__}.{name}"
                return Found(
                    path, shape, decided if isinstance(decided, Skip) else _fitted(decided, shape, own), origin
                )
    if len(shape) < 2:
        return Found(path, shape, Skip("one-dimensional" if shape else "a single number"))
    return Found(path, shape, Skip(f"no rule for {kind.__name__}.{name}", unknown=True))


def _fitted(axes: Axes, shape: tuple[int, ...], own: tuple[int, ...] | None) -> Rule:
    if own is None:
        return in_front(axes, shape)
    # The shape in the layer tells which axes a transformation has added, even where sizes are equal.
    fitted = in_front(axes, own)
    if isinstance(fitted, Skip):
        return fitted
    if len(own) != len(axes.shape):
        return Skip(f"shape {own} does not fit its layer: expected {len(axes.shape)} axes", unknown=True)
    return in_front(axes._replace(shape=own), shape)


def _declared(cls: type, name: str) -> tuple[Rule] | None:
    """Return what the class itself declares in its attribute ``weight_vectors``."""
    rules = cls.__dict__.get("weight_vectors")
    if not isinstance(rules, Mapping) or name not in rules:
        return None
    rule = rules[name]
    if rule is not None and not isinstance(rule, (str, WeightVectors, Skip)):
        raise TypeError(f"{cls.__name__}.weight_vectors[{name!r}] must be a pattern such as '[i] o', not {rule!r}")
    return (rule,)


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    """Return one size per axis, given one for all of them, one for each, or None for 1."""
    return (value or 1,) * count if value is None or isinstance(value, int) else tuple(value)


def _masked(module: Any) -> Skip | None:
    if getattr(module, "mask", None) is None:
        return None
    return Skip("masked kernel: the mean would include weights that the mask removes", unknown=True)


def _kernel(module: Any) -> tuple[int, ...]:
    return _sizes(getattr(module, "kernel_size", None) or module.kernel_shape, 1)


def _features(module: Any) -> int | None:
    """Return the number of output units; Haiku's depthwise convolution does not tell it."""
    for name in ("features", "out_features", "output_channels"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return None


def _convolution(module: Any) -> Axes | Skip:
    """[k…, in/groups, out]: with groups, a whole filter is one weight vector; in a depthwise one, its taps are."""
    kernel = _kernel(module)
    return _masked(module) or Axes(f"[{'k ' * len(kernel)}i] o", (*kernel, None, _features(module)))


def _local_convolution(module: Any) -> Axes | Skip:
    """[outputs…, k…·in, out]: each place of the output has weights of its own."""
    places = len(_kernel(module))
    return _masked(module) or Axes(f"{'p ' * places}[i] o", (None,) * (places + 1) + (_features(module),))


def _taps(kernel: Sequence[int], stride: Any, dilation: Any) -> str:
    """Return the pattern of the kernel's axes; each phase of a stride has weight vectors of its own."""
    count = len(kernel)
    taps = taps_of(kernel, _sizes(stride, count), _sizes(dilation, count))
    return " ".join(f"([m] {axis.phases})" if "(" in axis.pattern else axis.pattern for axis in taps)


def _transposed(stride: str, dilation: str, *, transpose: bool | None = None) -> Callable[[Any], Axes | Skip]:
    """Return the rule for [k…, in, out], or [k…, out, in] if the kernel is that of the convolution it transposes."""

    def rule(module: Any) -> Axes | Skip:
        kernel = _kernel(module)
        taps = _taps(kernel, getattr(module, stride), getattr(module, dilation, None))
        if module.transpose_kernel if transpose is None else transpose:
            return _masked(module) or Axes(f"{taps} o [i]", (*kernel, _features(module), None))
        return _masked(module) or Axes(f"{taps} [i] o", (*kernel, None, _features(module)))

    return rule


def _equinox_transposed(module: Any) -> Axes:
    sizes = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return Axes(f"o [i] {_taps(module.kernel_size, module.stride, module.dilation)}", sizes)


def _dense(module: Any) -> Axes:
    return Axes("[i] o", (None, module.features))


def _dense_general(module: Any) -> Axes:
    """[batch…, in…, out…]: every combination of batch and output axes is one unit, such as one dimension of a head."""
    outputs = _sizes(module.features, 1)
    return _general((None,) * len(module.batch_dims), (None,) * len(_sizes(module.axis, 1)), outputs)


def _linear_general(module: Any) -> Axes:
    return _general(tuple(module.batch_axis.values()), tuple(module.in_features), tuple(module.out_features))


def _general(batch: tuple[int | None, ...], inputs: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> Axes:
    pattern = f"{'b ' * len(batch)}[{' '.join('i' for _ in inputs)}]{' o' * len(outputs)}"
    return Axes(pattern, (*batch, *inputs, *outputs))


def _einsum(module: Any) -> Axes | Skip:
    """A unit sums over the axes of the kernel that its output lacks."""
    text = getattr(module, "einsum_str", None)
    if not isinstance(text, str):
        return Skip("Einsum whose einsum_str is an argument of the call", unknown=True)
    operands, _, output = text.replace(" ", "").partition("->")
    kernel = operands.split(",")[-1]
    if "..." in kernel or not output:
        return Skip(f"Einsum {text!r}: the axes of its kernel are not written out", unknown=True)
    if not {*kernel} - {*output}:
        return Skip("fan-in 1: its centered gradient is always zero")
    axes = (f"[{letter}]" if letter not in output else letter for letter in kernel)
    return Axes(" ".join(axes), getattr(module, "kernel_shape", None) or (None,) * len(kernel))


def _equinox_linear(module: Any) -> Axes:
    sizes = (1 if size == "scalar" else size for size in (module.out_features, module.in_features))
    return Axes("o [i]", (*sizes,))


def _equinox_convolution(module: Any) -> Axes:
    sizes = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return Axes(f"o [i{' k' * len(module.kernel_size)}]", sizes)


def _gates(count: int, inputs: str) -> Callable[[Any], Axes]:
    return lambda module: Axes("o [i]", (count * module.hidden_size, getattr(module, inputs)))


_NORM: Mapping[str, LayerRule] = {"scale": NORM_GAIN, "bias": BIAS, "offset": BIAS}
_FLAX: Mapping[str, Mapping[str, LayerRule]] = {
    "Embed": {"embedding": LOOKUP},
    "ConvTranspose": {"kernel": _transposed("strides", "kernel_dilation"), "bias": BIAS},
    "Einsum": {"kernel": _einsum, "bias": BIAS},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"), _NORM),
    "WeightNorm": {"*": NORM_GAIN},
    "PReLU": {"negative_slope": SLOPE},
}
_LINEN: Mapping[str, Mapping[str, LayerRule]] = {
    **_FLAX,
    "Dense": {"kernel": _dense, "bias": BIAS},
    "DenseGeneral": {"kernel": _dense_general, "bias": BIAS},
    "DenseParams": {"kernel": _dense, "bias": BIAS},  # of OptimizedLSTMCell
    "Conv": {"kernel": _convolution, "bias": BIAS},
    "ConvLocal": {"kernel": _local_convolution, "bias": BIAS},
}
_NNX: Mapping[str, Mapping[str, LayerRule]] = {
    **_FLAX,
    "Linear": {"kernel": lambda module: Axes("[i] o", (module.in_features, module.out_features)), "bias": BIAS},
    "LinearGeneral": {"kernel": _linear_general, "bias": BIAS},
    "Conv": {"kernel": _convolution, "bias": BIAS},
    "LoRA": {"lora_[ab]": _ONE},
}
_EQUINOX_NORM: Mapping[str, LayerRule] = {"weight": NORM_GAIN, "bias": BIAS}
_EQUINOX: Mapping[str, Mapping[str, LayerRule]] = {
    "Linear": {"weight": _equinox_linear, "bias": BIAS},
    "Conv": {"weight": _equinox_convolution, "bias": BIAS},
    "ConvTranspose": {"weight": _equinox_transposed, "bias": BIAS},
    "GRUCell": {"weight_ih": _gates(3, "input_size"), "weight_hh": _gates(3, "hidden_size"), "bias*": BIAS},
    "LSTMCell": {"weight_ih": _gates(4, "input_size"), "weight_hh": _gates(4, "hidden_size"), "bias": BIAS},
    "Embedding": {"weight": LOOKUP},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"), _EQUINOX_NORM),
    "WeightNorm": {"g": NORM_GAIN},
    "PReLU": {"negative_slope": SLOPE},
    "StateIndex": {"*": STATE},
}
_HAIKU: Mapping[str, Mapping[str, LayerRule]] = {
    "Linear": {"w": lambda module: Axes("[i] o", (None, module.output_size)), "b": BIAS},
    "ConvND": {"w": _convolution, "b": BIAS},
    "DepthwiseConvND": {"w": _convolution, "b": BIAS},
    "ConvNDTranspose": {"w": _transposed("stride", "dilation", transpose=True), "b": BIAS},
    "GRU": {
        "w_i": lambda module: Axes("[i] o", (None, 3 * module.hidden_size)),
        "w_h": lambda module: Axes("[i] o", (module.hidden_size, 3 * module.hidden_size)),
        "b": BIAS,
    },
    "Embed": {"embeddings": LOOKUP},
    "Bias": {"b": BIAS},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm"), _NORM),
}
_TABLES: Mapping[str, tuple[str, Mapping[str, Mapping[str, LayerRule]]]] = {
    "flax.linen": ("linen", _LINEN),
    "flax.nnx": ("nnx", _NNX),
    "equinox": ("equinox", _EQUINOX),
    "haiku": ("haiku", _HAIKU),
}


def _table_of(cls: type) -> tuple[str, Mapping[str, Mapping[str, LayerRule]]]:
    for package, named in _TABLES.items():
        if cls.__module__ == package or cls.__module__.startswith(f"{package}."):
            return named
    return "", {}
