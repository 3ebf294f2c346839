"""The layout of a Keras model: which elements of each weight form one weight vector. Needs Keras 3, and no torch.

Keras stores most kernels with the output units on the *last* axis: ``[in, out]`` and ``[k, k, in, out]``. Transposed
and depthwise convolutions and some einsum kernels differ, which their shapes do not reveal. The rules below are found
by the layer's class and the weight's name.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras

from gradcentral.weight_vectors import WeightVectors, as_vectors

__all__ = ["Entry", "Layout", "weight_layout"]

Override = str | WeightVectors | None


@dataclass(frozen=True)
class Entry:
    """One weight of a model: its weight vectors, or why it is left alone."""

    path: str
    shape: tuple[int, ...]
    vectors: WeightVectors | None
    reason: str
    """The rule that decided, or why the weight is left alone."""
    unknown: bool = False
    """Whether it is left alone only because no rule covers it."""
    trained: bool = True


class Layout:
    """The weight vectors of a Keras model, created by `weight_layout`. Printing it shows a table.

    Attributes:
        entries: one `Entry` per trainable or frozen weight, in the order of ``model.weights``.
    """

    def __init__(self, entries: Sequence[Entry], variables: Sequence[keras.Variable] = ()) -> None:
        self.entries = tuple(entries)
        self._variables = list(variables)  # empty after loading; the order of the entries then identifies them

    def __getitem__(self, path: str) -> WeightVectors:
        """Return the weight vectors of a weight, by its path; a KeyError gives the reason if it is left alone."""
        for entry in self.entries:
            if entry.path == path:
                if entry.vectors is None:
                    raise KeyError(f"{path} is left alone: {entry.reason}")
                return entry.vectors
        raise KeyError(f"the model has no weight {path!r}; its weights are {[entry.path for entry in self.entries]}")

    def __contains__(self, path: object) -> bool:
        return any(entry.path == path and entry.vectors is not None for entry in self.entries)

    def __iter__(self) -> Iterator[str]:
        return (entry.path for entry in self.entries if entry.vectors is not None)

    def __len__(self) -> int:
        return sum(entry.vectors is not None for entry in self.entries)

    @property
    def skipped(self) -> dict[str, str]:
        """{path: reason} of every weight that is left alone."""
        return {entry.path: entry.reason for entry in self.entries if entry.vectors is None}

    @property
    def unknown(self) -> tuple[Entry, ...]:
        """The trained weights that are left alone only because no rule covers them."""
        return tuple(entry for entry in self.entries if entry.unknown and entry.trained)

    def of(self, variables: Sequence[keras.Variable]) -> list[Entry | None]:
        """Return the entry of each variable; None for one that is not a weight of the model.

        Raises:
            ValueError: the layout was loaded from a file, and the variables are not those that it was saved for.
        """
        if self._variables:
            found = {id(variable): entry for variable, entry in zip(self._variables, self.entries, strict=True)}
            return [found.get(id(variable)) for variable in variables]
        if [tuple(variable.shape) for variable in variables] != [entry.shape for entry in self.entries]:
            raise ValueError(
                "the saved layout does not fit these variables, whose number or shapes have changed: call "
                "centralize(optimizer.inner_optimizer, model) again"
            )
        return list(self.entries)

    def get_config(self, variables: Sequence[keras.Variable] | None = None) -> list[dict[str, Any]]:
        """Return the entries of the given variables, in their order, as plain data; by default the trained entries."""
        if variables is None:
            return [asdict(entry) for entry in self.entries if entry.trained]
        entries = [
            entry or Entry(variable.path, tuple(variable.shape), None, "not a weight of the model")
            for variable, entry in zip(variables, self.of(variables), strict=True)
        ]
        return [asdict(entry) for entry in entries]

    @classmethod
    def from_config(cls, config: Sequence[Mapping[str, Any]]) -> Layout:
        """Create a layout from the result of `get_config`."""
        return cls([_entry_from(fields) for fields in config])

    def __str__(self) -> str:
        """Return a table: path, shape, weight vectors (count × fan-in and pattern), and the rule or the reason."""
        lines = [("weight", "shape", "weight vectors", "decided by")]
        for entry in self.entries:
            shape = "×".join(map(str, entry.shape)) or "scalar"
            vectors = entry.vectors
            text = "–" if vectors is None else f"{vectors.count} × {vectors.fan_in}  {vectors.pattern}"
            lines.append((entry.path, shape, text, entry.reason + ("" if entry.trained else "; not trained")))
        *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
        text = "\n".join("  ".join((*map(str.ljust, line, widths), line[-1])) for line in lines)
        text += f"\n\n{len(self)} of {len(self.entries)} weights are centered"
        if self.unknown:
            text += "\nRules for the unknown weights, to paste and edit:\n  overrides={"
            text += ", ".join(f'"{entry.path}": "{_suggestion(entry.shape)}"' for entry in self.unknown) + "}"
        return text

    __repr__ = __str__


def weight_layout(model: keras.Model, *, overrides: Mapping[str, Override] | None = None) -> Layout:
    """Decide which elements of each weight of a Keras model form one weight vector.

    An override decides first; otherwise the rule for (class of the layer, name of the weight). A weight without a rule
    is left alone and reported in ``unknown``, never guessed.

    Args:
        model: a model that has been built, so that its weights exist.
        overrides: {path of a weight: rule}. A path may have wildcards as in `fnmatch` (``"*/proj/kernel"``) and is
            ``variable.path``, as printed. A rule is a pattern such as ``"[i] o"``, `WeightVectors`, or None to leave
            the weight alone. An exact path takes precedence; among several wildcards the last one does.

    Raises:
        ValueError: the model is not built; an override matches no weight, or does not fit its shape.
        TypeError: an override is neither a pattern, `WeightVectors` nor None.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> layout = weight_layout(model)
        >>> [vectors.pattern for vectors in map(layout.__getitem__, layout)]
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
    paths = [variable.path for variable in variables]
    rules = {path: _override_of(path, overrides or {}) for path in paths}
    for selector in overrides or {}:
        if not any(path == selector or fnmatch.fnmatchcase(path, selector) for path in paths):
            raise ValueError(f"overrides: {selector!r} matches no weight; the weights are {', '.join(paths)}")
    entries = []
    for variable in variables:
        selector = rules[variable.path]
        if selector is None:
            entry = _by_rule(variable, owners[id(variable)])
        else:
            entry = _by_override(variable, selector, (overrides or {})[selector])
        entries.append(replace(entry, trained=bool(variable.trainable)))
    return Layout(entries, variables)


def _override_of(path: str, overrides: Mapping[str, Override]) -> str | None:
    """Return the selector that applies to a path."""
    if path in overrides:
        return path
    return next((each for each in reversed([*overrides]) if fnmatch.fnmatchcase(path, each)), None)


def _by_override(variable: keras.Variable, selector: str, rule: Override) -> Entry:
    shape = tuple(variable.shape)
    if rule is None:
        return Entry(variable.path, shape, None, f"override {selector!r}")
    try:
        vectors = as_vectors(rule, shape)
    except (ValueError, TypeError) as error:
        raise type(error)(f"overrides[{selector!r}], for {variable.path}: {error}") from None
    return Entry(variable.path, shape, vectors, f"override {selector!r}")


def _by_rule(variable: keras.Variable, layers: Sequence[keras.Layer]) -> Entry:
    """Decide by the rules of the layers that own a variable, which are several if they share it."""
    decisions = [_decide(layer, variable) for layer in layers]
    first = decisions[0]
    if any(other.vectors != first.vectors for other in decisions):
        classes = " and ".join(type(layer).__name__ for layer in layers)
        return replace(first, vectors=None, reason=f"shared by {classes}, which use it differently", unknown=True)
    return first


def _decide(layer: keras.Layer, variable: keras.Variable) -> Entry:
    shape = tuple(variable.shape)
    skip = Entry(variable.path, shape, None, "")
    # Keras' classes are found by their names, so that no private module of Keras is imported.
    for cls in type(layer).__mro__:
        if cls.__module__.split(".")[0] == "keras" and variable.name in _RULES.get(cls.__name__, {}):
            rule = _RULES[cls.__name__][variable.name]
            break
    else:
        if len(shape) < 2:
            return replace(skip, reason="fewer than two axes")
        return replace(skip, reason=f"no rule for {type(layer).__name__}.{variable.name}", unknown=True)
    if isinstance(rule, str):
        return replace(skip, reason=rule)
    try:
        vectors = rule(layer, shape)
    except (ValueError, TypeError, AttributeError) as error:
        return replace(skip, reason=f"{cls.__name__}.{variable.name}: {error}", unknown=True)
    if not keras.backend.is_float_dtype(variable.dtype) or "float8" in variable.dtype:
        return replace(skip, reason=f"dtype {variable.dtype} has no mean")
    if vectors is None or vectors.fan_in == 1:
        return replace(skip, reason="fan-in of 1: its centered gradient is always zero")
    return replace(skip, vectors=vectors, reason=f"{cls.__name__}.{variable.name}")


def _entry_from(fields: Mapping[str, Any]) -> Entry:
    vectors = fields["vectors"]
    if vectors is not None:
        sizes = {name: None if value is None else tuple(value) for name, value in vectors.items()}
        vectors = WeightVectors(**sizes)
    return Entry(**{**fields, "shape": tuple(fields["shape"]), "vectors": vectors})


def _suggestion(shape: tuple[int, ...]) -> str:
    """Return the pattern of most Keras kernels, which is right if the layer's output units are on the last axis."""
    return f"[{' '.join(['i'] * (len(shape) - 1))}] o"


# The rules: a reason to leave a weight alone, or a function of (layer, shape) that returns its weight vectors.

_Rule = str | Callable[[Any, tuple[int, ...]], WeightVectors | None]


def _axes(pattern: str, **attributes: str) -> _Rule:
    """Return the rule of a pattern, in which some names have the sizes that the layer's attributes give."""
    return lambda layer, shape: WeightVectors.parse(
        pattern, shape, **{name: getattr(layer, attribute) for name, attribute in attributes.items()}
    )


def _gates(pattern: str, factor: int, attribute: str) -> _Rule:
    """Return the rule of a pattern whose axis o holds the gates of a recurrent cell next to one another."""
    return lambda layer, shape: WeightVectors.parse(pattern, shape, o=factor * getattr(layer, attribute))


def _einsum(layer: Any, shape: tuple[int, ...]) -> WeightVectors | None:
    """Return the weight vectors of a kernel in an equation: the axes that the output does not have are summed over.

    An attention projection ``abc,cde->abde`` has heads d with components e; each component of each head is one output
    unit, with the weights of axis c.
    """
    return _contracted(*_terms(layer), shape)


def _einsum_lora_a(layer: Any, shape: tuple[int, ...]) -> WeightVectors | None:
    """Return those of the first factor of a low-rank kernel, whose last axis is the rank."""
    kernel, output = _terms(layer)
    return _contracted(kernel[:-1] + "?", output + "?", shape)


def _contracted(kernel: str, output: str, shape: tuple[int, ...]) -> WeightVectors | None:
    axes = [axis.replace("?", "rank") if axis in output else f"[{axis}]" for axis in kernel]
    return WeightVectors.parse(" ".join(axes), shape) if any("[" in axis for axis in axes) else None


def _terms(layer: Any) -> tuple[str, str]:
    _, kernel, output = re.split(",|->", layer.equation.replace(" ", ""))
    return kernel, output


def _transposed(layer: Any, shape: tuple[int, ...]) -> WeightVectors:
    """Return one weight vector per output channel and phase: the input channels, and the taps of that phase.

    An input at n reaches the outputs n · stride + t · dilation through the taps t, so the taps that reach one output
    are equal modulo stride / gcd(stride, dilation). Along an axis whose size is no multiple of that, outputs differ in
    the number of their taps; a weight vector then runs over the taps of all phases. As in gradcentral for torch.
    """
    taps = []
    for size, stride, dilation in zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True):
        phases = stride // math.gcd(stride, dilation)
        if size <= phases > 1:
            taps.append(str(size))
        elif phases == 1 or size % phases:
            taps.append(f"[{size}]")
        else:
            taps.append(f"([m] {phases})")
    return WeightVectors.parse(" ".join([*taps, "o [i]"]), shape, o=layer.filters)


_BIAS = "bias"
_GAIN = "gain of a normalization"
_LOOKUP = "lookup table: a row is the vector of one token, not the weights of a unit"
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
    "PReLU": {"alpha": "parameter of an activation"},
    "Attention": {"scale": "scale of the scores", "concat_score_weight": "scale of the scores"},
    "AdditiveAttention": {"scale": "scale of the scores"},
}
