"""The layers of a Flax linen or Haiku model, recorded while a function that initializes it is traced."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gradcentral.integrations.named_layout import Found, Skip
from gradcentral.integrations.optax.by_name import found_by_name
from gradcentral.integrations.optax.names import name_of_path
from gradcentral.integrations.optax.rules import decision

__all__ = ["found_in_init"]

_Layer = tuple[Any, Mapping[str, tuple[int, ...]]]  # a module, and the shapes of its own parameters


def found_in_init(init: Callable[[], Any]) -> Iterator[Found]:
    """Yield the parameters that a function creates, with the decisions of the layers that create them.

    Args:
        init: a function without arguments that returns what ``init`` of a linen module or of a transformed Haiku
            function returns.

    Raises:
        TypeError: no layer of linen or Haiku was called, or the function returns no parameters.
    """
    layers: dict[str, list[_Layer]] = {}
    haiku = sys.modules.get("haiku")
    with contextlib.ExitStack() as stack:
        if linen := sys.modules.get("flax.linen"):
            stack.enter_context(linen.intercept_methods(_recorder_of_linen(layers)))
        if haiku:
            stack.enter_context(haiku.intercept_methods(_recorder_of_haiku(layers)))
        variables = jax.eval_shape(init)
    if isinstance(variables, tuple):  # (parameters, state) of Haiku, or (output, variables) of init_with_output
        variables = next((part for part in variables if isinstance(part, Mapping)), None)
    if not layers or not isinstance(variables, Mapping):
        raise TypeError(
            "the function initializes no model of Flax linen or Haiku: it must call model.init without jax.jit, as in "
            "weight_layout(lambda: model.init(key, x)). Pass a model of Flax nnx or Equinox itself"
        )
    params = variables.get("params", variables) if linen else variables
    for path, leaf in jax.tree_util.tree_leaves_with_path(_unboxed(params, linen)):
        yield _decided(name_of_path(path), leaf, layers)


def _recorder_of_linen(layers: dict[str, list[_Layer]]) -> Callable[..., Any]:
    def record(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        output = call(*arguments, **options)
        module = context.module
        if module.scope is not None:
            own = _unboxed(module.variables.get("params", {}), sys.modules["flax.linen"])
            shapes = {name: tuple(value.shape) for name, value in own.items() if not isinstance(value, Mapping)}
            layers.setdefault("/".join(module.path), []).append((module, shapes))
        return output

    return record


def _recorder_of_haiku(layers: dict[str, list[_Layer]]) -> Callable[..., Any]:
    def record(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        output = call(*arguments, **options)
        layers.setdefault(context.module.module_name, []).append((context.module, {}))
        return output

    return record


def _unboxed(tree: Any, linen: Any) -> Any:
    """Remove the boxes that hold the axis names of sharded parameters in linen."""
    return linen.meta.unbox(tree) if linen else tree


def _decided(path: str, leaf: Any, layers: Mapping[str, list[_Layer]]) -> Found:
    shape = tuple(leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return Found(path, shape, Skip(f"dtype {leaf.dtype} has no mean"))
    prefix = max((name for name in layers if not name or path.startswith(f"{name}/")), key=len, default=None)
    if prefix is None:
        return Found(path, shape, Skip("created outside of every layer", unknown=True))
    if any(type(module).__name__ == "LiftingModule" for module, _ in layers[prefix]):
        return next(found_by_name({path: leaf}))  # Haiku's layer_stack calls its layers by other names
    name = path[len(prefix) + 1 :] if prefix else path
    # Several modules may be in one place, such as the one that a transformed class wraps. The owner knows the shape.
    owners = sorted(layers[prefix], key=lambda layer: name not in layer[1])
    decisions = [decision(module, name, path, shape, own.get(name)) for module, own in owners]
    known = [found for found in decisions if not (isinstance(found.rule, Skip) and found.rule.unknown)]
    if any(found.rule != known[0].rule for found in known):
        kinds = " and ".join(dict.fromkeys(found.origin for found in known))
        return Found(path, shape, Skip(f"several layers of this name: {kinds}", unknown=True))
    return (known or decisions)[0]
