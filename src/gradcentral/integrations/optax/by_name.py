"""Parameters without a model: the automatic names of linen and Haiku tell the class of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from gradcentral.integrations.named_layout import Found, Rule, Skip
from gradcentral.integrations.optax.rules import BIAS, LOOKUP, NORM_GAIN, Axes, in_front

__all__ = ["HINT", "found_by_name"]

HINT = (
    "A function that initializes the model tells the layers and their settings: "
    "weight_layout(lambda: model.init(key, x))"
)
_ONE = Axes("[i] o", (None, None))
_TO_HEADS, _FROM_HEADS = Axes("[i] h d", (None, None, None)), Axes("[h d] o", (None, None, None))

# {class in an automatic name: axes}; None if they depend on the settings of the layer.
_LINEN = {"Dense": _ONE, "ConvTranspose": None, "ConvLocal": None, "DenseGeneral": None, "Einsum": None}
_HAIKU = {
    "linear": _ONE,
    **{f"conv{n}_d": Axes(f"[{'k ' * n}i] o", (None,) * (n + 2)) for n in (1, 2, 3)},
    **{f"depthwise_conv{n}_d": Axes(f"[{'k ' * n}i] o", (*[None] * n, 1, None)) for n in (1, 2, 3)},
    **{f"conv{n}_d_transpose": None for n in (1, 2, 3)},
}
_GATES = {f"{source}{gate}": _ONE for source in "ih" for gate in "ifgornz"}
# {class in the automatic name of the parent: {name of the layer: axes}}
_ATTENTION = {"query": _TO_HEADS, "key": _TO_HEADS, "value": _TO_HEADS, "out": _FROM_HEADS}
_PARENTS = {
    **dict.fromkeys(("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"), _ATTENTION),
    "LSTMCell": _GATES,
    "OptimizedLSTMCell": _GATES,
    "GRUCell": _GATES,
    "MGUCell": _GATES,
    "SimpleCell": {"i": _ONE, "h": _ONE},
    "multi_head_attention": dict.fromkeys(("query", "key", "value"), _ONE),
}
_SKIPPED = {
    **dict.fromkeys(("bias", "b", "offset"), BIAS),
    "scale": NORM_GAIN,
    **dict.fromkeys(("embedding", "embeddings"), LOOKUP),
}


def found_by_name(leaves: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the parameters with what their names decide.

    Args:
        leaves: {path with slashes: array}.
    """
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        yield Found(path, shape, *_decided(path, shape, leaf.dtype, leaves))


def _decided(path: str, shape: tuple[int, ...], dtype: Any, leaves: Mapping[str, Any]) -> tuple[Rule, str]:
    """Return the rule for a parameter and its origin."""
    *owners, name = path.removesuffix("/value").split("/")  # linen's boxes around sharded parameters hold a value
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Skip(f"dtype {dtype} has no mean"), ""
    if name in _SKIPPED:
        return _SKIPPED[name], ""
    if len(shape) < 2:
        return Skip("one-dimensional" if shape else "a single number"), ""
    layer, parent = ([*map(_class_in, reversed(owners)), "", ""])[:2]
    own = _PARENTS.get(parent, {}).get(owners[-1] if owners else "")
    if name in ("kernel", "w") and own is not None:
        return in_front(own, shape), f"the name {parent}"
    if layer == "gru" and name in ("w_i", "w_h"):
        return in_front(_ONE, shape), "the name gru"
    table: Mapping[str, Axes | None] = _LINEN if name == "kernel" else _HAIKU if name == "w" else {}
    if layer == "Conv" and name == "kernel":
        return _convolution(owners, shape, leaves), "the name Conv"
    if layer not in table:
        return Skip("the name does not tell its layer", unknown=True), ""
    if (axes := table[layer]) is None:
        return Skip(f"the axes of a {layer} depend on its settings", unknown=True), ""
    return in_front(axes, shape), f"the name {layer}"


def _class_in(owner: str) -> str:
    """Return the class in an automatic name: ``Dense`` in ``ScanDense_0``, ``linear`` in ``linear_1``."""
    return re.sub(r"^(Scan|Vmap|Checkpoint|Remat|Jit)+(?=[A-Z])|_\d+$", "", owner)


def _convolution(owners: list[str], shape: tuple[int, ...], leaves: Mapping[str, Any]) -> Rule:
    """Decide whether a kernel of linen's Conv is one kernel or a stack of kernels of fewer dimensions.

    Its bias has one axis, and as many more as the layers are stacked; so have the biases and gains of other layers in
    the same module, except for those that a transformation has repeated.
    """
    own = "/".join(owners)
    beside = re.escape("/".join(owners[:-1]) + "/" * (len(owners) > 1)) + r"(?!Scan|Vmap)[A-Z]\w*_\d+"
    for place in (re.escape(own), beside):
        ranks = [leaf.ndim for path, leaf in leaves.items() if re.fullmatch(rf"{place}/(bias|scale)(/value)?", path)]
        if ranks and (kernel := len(shape) - min(ranks) - 1) > 0:
            return in_front(Axes(f"[{'k ' * kernel}i] o", (None,) * (kernel + 2)), shape)
    return Skip("one kernel, or a stack of kernels of fewer dimensions", unknown=True)
