"""The layout of a Keras model: which elements of each weight form one weight vector. Needs Keras 3, and no torch.

Keras stores most kernels with the output units on the *last* axis: ``[in, out]`` and ``[k, k, in, out]``. Transposed
and depthwise convolutions and some einsum kernels differ, which their shapes do not reveal. The rules below are found
by the layer's class and the weight's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import keras

from gradcentral.integrations.named_layout import Found, NamedEntry, NamedLayout, Rule, Skip, decide
from gradcentral.transposed_taps import SPLIT, taps_of
from gradcentral.weight_vectors import WeightVectors

__all__ = ["KerasLayout", "weight_layout"]


class KerasLayout(NamedLayout):
    """The weight vectors of a Keras model: a mapping from the path of each centered weight to its `WeightVectors`.

    Created by `weight_layout`; printing it shows a table. Weights that are not trained are included.
    """

    def __init__(self, entries: Sequence[NamedEntry], variables: Sequence[keras.Variable] = ()) -> None:
        super().__init__(entries)
        self._variables = list(variables)  # empty after loading: then the order identifies them

    def of(self, variables: Sequence[keras.Variable]) -> list[NamedEntry | None]:
        """Return the entry of each variable; None for one that is not a weight of the model.

        Raises:
            ValueError: the layout was loaded from a file, and the variables are not those that it was saved for.
        """
        if self._variables:  # two weights may have the same path, so each is looked up by its identity
            found = {id(variable): entry for variable, entry in zip(self._variables, self.entries, strict=True)}
            return [found.get(id(variable)) for variable in variables]
        if [tuple(variable.shape) for variable in variables] != [entry.shape for entry in self.entries]:
            raise ValueError(
                "the saved layout does not fit these variables, whose number or shapes have changed: call "
                "centralize(optimizer.inner_optimizer, model) again"
            )
        return list(self.entries)

    def get_config(self, variables: Sequence[keras.Variable] | None = None) -> list[dict[str, Any]]:
        """Return the entries of the given variables, in their order, as plain data; by default of those trained."""
        if variables is None:
            variables = [variable for variable in self._variables if variable.trainable]
        if not variables:
            return [asdict(entry) for entry in self.entries]
        missing = [NamedEntry(each.path, tuple(each.shape), None, reason="not in the model") for each in variables]
        return [asdict(entry or none) for entry, none in zip(self.of(variables), missing, strict=True)]

    @classmethod
    def from_config(cls, config: Sequence[Mapping[str, Any]]) -> KerasLayout:
        """Create a layout from the result of `get_config`."""
        return cls([_entry_from(fields) for fields in config])


def weight_layout(model: keras.Model, *, overrides: Mapping[str, Rule] | None = None) -> KerasLayout:
    """Decide which elements of each weight of a Keras model form one weight vector.

    An override decides first; otherwise the rule for (class of the layer, name of the weight). A weight without a rule
    is skipped and reported in ``unknown``, never guessed.

    Args:
        model: a model that has been built, so that its weights exist.
        overrides: {path: rule}. The path of a weight is its ``path``, as printed, and may have wildcards as in
            ``fnmatch`` (``"**/proj/kernel"``); the last match applies. A rule is a pattern such as ``"[i] o"``,
            `WeightVectors`, or None to skip the weight.

    Raises:
        ValueError: the model is not built; an override matches no weight, or does not fit its shape.
        TypeError: an override is not a rule.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> [vectors.pattern for vectors in weight_layout(model).values()]
        ['[i] o']
    """
    if not model.built:
        raise ValueError(
            f"the model {model.name!r} has no weights yet: begin it with keras.Input(shape), or call "
            "model.build(input_shape) first"
        )
    owners: dict[int, list[keras.Layer]] = {}
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables:  # of this layer alone, and also if it is frozen
            owners.setdefault(id(variable), []).append(layer)
    variables = [variable for variable in model.weights if id(variable) in owners]
    found = [_find(variable, owners[id(variable)]) for variable in variables]
    return KerasLayout(decide(found, overrides).entries, variables)


def _find(variable: keras.Variable, layers: Sequence[keras.Layer]) -> Found:
    """Find the rule of a variable; several layers may share it."""
    # A wrapper such as SpectralNormalization may refer to a weight that the layer inside of it uses.
    layers = [layer for layer in layers if not (isinstance(layer, keras.layers.Wrapper) and layer.layer in layers)]
    decisions = [_decide(layer, variable) for layer in layers]
    rule, origin = decisions[0]
    if any(other != rule for other, _ in decisions):
        rule = Skip(f"shared by {' and '.join(type(layer).__name__ for layer in layers)}, which use it differently")
    if not variable.trainable:
        origin += "; not trained"
        if isinstance(rule, Skip):
            rule = Skip(f"{rule.reason}; not trained")
    return Found(variable.path, tuple(variable.shape), rule, origin)


def _decide(layer: keras.Layer, variable: keras.Variable) -> tuple[Rule, str]:
    """Return the decision of a layer's rule, and the rule as class and weight."""
    shape = tuple(variable.shape)
    # Keras' classes are found by their names, so that no private module of Keras is imported.
    for cls in type(layer).__mro__:
        if cls.__module__.split(".")[0] == "keras" and variable.name in _RULES.get(cls.__name__, {}):
            break
    else:
        if len(shape) < 2:
            return Skip("one-dimensional" if shape else "a single number"), ""
        return Skip(f"no rule for {type(layer).__name__}.{variable.name}", unknown=True), ""
    rule, origin = _RULES[cls.__name__][variable.name], f"{cls.__name__}.{variable.name}"
    if isinstance(rule, Skip):
        return rule, origin
    if not keras.backend.is_float_dtype(variable.dtype) or "float8" in variable.dtype:
        return Skip(f"dtype {variable.dtype} has no mean"), origin
    try:
        return rule(layer, shape), origin
    except (ValueError, TypeError, AttributeError) as error:  # a subclass that uses the name for something else
        return Skip(f"{origin}: {error}", unknown=True), origin


def _entry_from(fields: Mapping[str, Any]) -> NamedEntry:
    vectors = fields["vectors"]
    if vectors is not None:
        vectors = WeightVectors(**{name: value and tuple(value) for name, value in vectors.items()})
    return NamedEntry(
        **{**fields, "shape": tuple(fields["shape"]), "aliases": tuple(fields["aliases"]), "vectors": vectors}
    )


# The rules: why a weight is skipped, or a function of (layer, shape) that returns its weight vectors.

_Rule = Skip | Callable[[Any, tuple[int, ...]], WeightVectors | Skip]


def _axes(pattern: str, **attributes: str) -> _Rule:
    """Return the rule of a pattern, in which some names have the sizes that the layer's attributes give."""
    return lambda layer, shape: WeightVectors.parse(
        pattern, shape, **{name: getattr(layer, attribute) for name, attribute in attributes.items()}
    )


def _gates(pattern: str, factor: int, attribute: str) -> _Rule:
    """Return the rule of a pattern whose axis o holds the gates of a recurrent cell next to one another."""
    return lambda layer, shape: WeightVectors.parse(pattern, shape, o=factor * getattr(layer, attribute))


def _einsum(layer: Any, shape: tuple[int, ...]) -> WeightVectors | Skip:
    """Return the weight vectors of a kernel in an equation: the axes that the output does not have are summed over.

    An attention projection ``abc,cde->abde`` has heads d with components e; each component of each head is one output
    unit, with the weights of axis c.
    """
    return _contracted(*_terms(layer), shape)


def _einsum_lora_a(layer: Any, shape: tuple[int, ...]) -> WeightVectors | Skip:
    """Return those of the first factor of a low-rank kernel, whose last axis is the rank."""
    kernel, output = _terms(layer)
    return _contracted(kernel[:-1] + "?", output + "?", shape)


def _contracted(kernel: str, output: str, shape: tuple[int, ...]) -> WeightVectors | Skip:
    axes = [axis.replace("?", "rank") if axis in output else f"[{axis}]" for axis in kernel]
    if not any("[" in axis for axis in axes):
        return Skip("fan-in 1: its centered gradient is always zero")
    return WeightVectors.parse(" ".join(axes), shape)


def _terms(layer: Any) -> tuple[str, str]:
    _, kernel, output = re.split(",|->", layer.equation.replace(" ", ""))
    return kernel, output


def _transposed(layer: Any, shape: tuple[int, ...]) -> WeightVectors:
    """Return one weight vector per output channel and phase: the input channels, and the taps of that phase.

    Along an axis with uneven phases, a weight vector runs over the taps of all phases. As in torch's layers.
    """
    taps = taps_of(layer.kernel_size, layer.strides, layer.dilation_rate)
    axes = [f"([m] {axis.phases})" if axis.pattern == SPLIT else axis.pattern for axis in taps]
    return WeightVectors.parse(" ".join([*axes, "o [i]"]), shape, o=layer.filters)


_BIAS = Skip("bias")
_GAIN = Skip("gain of a normalization")
_LOOKUP = Skip("lookup table: a row is the vector of one token, not the weights of a unit")
_SCORES = Skip("scale of the scores")
_NORMALIZATION: dict[str, _Rule] = {"gamma": _GAIN, "beta": _BIAS, "scale": _GAIN}
_LORA_B = _axes("[i] o", i="lora_rank")

_RULES: dict[str, dict[str, _Rule]] = {
    "Dense": {
        "kernel": _axes("[i] o", o="units"),
        "lora_kernel_a": _axes("[i] o", o="lora_rank"),
        "lora_kernel_b": _LORA_B,
        "bias": _BIAS,
    },
    "EinsumDense": {"kernel": _einsum, "lora_kernel_a": _einsum_lora_a, "lora_kernel_b": _LORA_B, "bias": _BIAS},
    # With groups, the axis i of a convolution holds in/groups channels, so that a whole filter is one weight vector.
    "BaseConv": {
        "kernel": _axes("[k... i] o", k="kernel_size", o="filters"),
        "lora_kernel_a": _axes("[k... i] o", k="kernel_size", o="lora_rank"),
        "lora_kernel_b": _LORA_B,
        "bias": _BIAS,
    },
    "BaseConvTranspose": {"kernel": _transposed, "bias": _BIAS},
    # Each input channel has `depth_multiplier` output channels, whose weights are the taps alone.
    "BaseDepthwiseConv": {"kernel": _axes("[k...] c m", k="kernel_size", m="depth_multiplier"), "bias": _BIAS},
    "BaseSeparableConv": {
        "depthwise_kernel": _axes("[k...] c m", k="kernel_size", m="depth_multiplier"),
        "pointwise_kernel": _axes("[k... i] o", o="filters"),
        "bias": _BIAS,
    },
    "SimpleRNNCell": {
        "kernel": _gates("[i] o", 1, "units"),
        "recurrent_kernel": _gates("[i] o", 1, "units"),
        "bias": _BIAS,
    },
    "GRUCell": {
        "kernel": _gates("[i] o", 3, "units"),
        "recurrent_kernel": _gates("[i] o", 3, "units"),
        "bias": _BIAS,
    },
    "LSTMCell": {
        "kernel": _gates("[i] o", 4, "units"),
        "recurrent_kernel": _gates("[i] o", 4, "units"),
        "bias": _BIAS,
    },
    "ConvLSTMCell": {
        "kernel": _gates("[k... i] o", 4, "filters"),
        "recurrent_kernel": _gates("[k... i] o", 4, "filters"),
        "bias": _BIAS,
    },
    "Embedding": {
        "embeddings": _LOOKUP,
        "lora_embeddings_a": _LOOKUP,
        "lora_embeddings_b": _LORA_B,
    },
    "ReversibleEmbedding": {"reverse_embeddings": _axes("[i] o", o="input_dim", i="output_dim")},
    "BatchNormalization": _NORMALIZATION,
    "GroupNormalization": _NORMALIZATION,
    "LayerNormalization": _NORMALIZATION,
    "RMSNormalization": _NORMALIZATION,
    "PReLU": {"alpha": Skip("parameter of an activation")},
    "Attention": {"scale": _SCORES, "concat_score_weight": _SCORES},
    "AdditiveAttention": {"scale": _SCORES},
}
