"""`weight_layout` for models and parameters of Flax, Equinox and Haiku."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gradcentral.integrations.named_layout import Found, NamedLayout, Rule, Skip, decide
from gradcentral.integrations.optax.by_name import HINT, found_by_name
from gradcentral.integrations.optax.names import key_of, name_of_path
from gradcentral.integrations.optax.rules import decision
from gradcentral.integrations.optax.traced import found_in_init

__all__ = ["weight_layout"]

_NNX_HINT = "The model tells the layers, which its state does not: weight_layout(model)"


def weight_layout(
    model: Any, *, overrides: Mapping[str, Rule] | None = None, exclude: Iterable[str] = ()
) -> NamedLayout:
    """Decide which elements of each parameter of a JAX model form one weight vector.

    The layers' classes determine the layout. A parameter without a rule is skipped and reported, never guessed.

    Args:
        model: one of

            - a Flax nnx or Equinox model, or a tree that contains such models;
            - for Flax linen and Haiku, whose parameters do not tell their layers, a function that initializes the
              model, such as ``lambda: model.init(key, x)``. It is traced without computing anything;
            - the parameters alone. Then the automatic names of linen and Haiku decide (``Dense_0/kernel``,
              ``mlp/~/linear_0/w``), and layers whose axes depend on their settings are skipped as unknown.
        overrides: {name: rule}, where the name is the parameter's path with slashes, and may have wildcards as in
            ``fnmatch`` (``"**/proj/kernel"`` also matches ``proj/kernel``), and the rule is a pattern such as
            ``"[i] o"`` (see `WeightVectors.parse`), `WeightVectors`, or None (skip). The last match applies.
        exclude: names of parameters to skip, with or without wildcards.

    Returns:
        A `NamedLayout`; print it to see the table.

    Raises:
        ValueError: an override or exclude matches no parameter; an override does not fit the shape or gives a fan-in
            of 1; a linen module was given without a function that initializes it.
        TypeError: an override is not a rule; model is none of the above.

    Source: Yong et al. 2020, section 3.2.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(weight_layout({"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}))
        parameter       shape  weight vectors  decided by
        -----------------------------------------------------
        Dense_0/bias    2      –               bias
        Dense_0/kernel  3×2    2 × 3  [i] o    the name Dense
        <BLANKLINE>
        1 of 2 parameters are centered (75.0% of the elements)
    """
    found, hint = _found(model)
    return decide([*found], overrides, exclude, hint)


def _found(model: Any) -> tuple[Iterable[Found], str]:
    """Return the parameters with the decisions of their layers' rules, and a hint for the unknown ones."""
    linen, nnx, equinox = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox"))
    if isinstance(model, type):
        raise TypeError(f"model must be a model, not its class: create a {model.__name__}(...) first")
    if linen and isinstance(model, linen.Module):
        raise ValueError(
            f"the parameters of a {type(model).__name__} do not exist before it is initialized: pass a function that "
            "does it, such as weight_layout(lambda: model.init(key, x))"
        )
    if nnx and _contains(model, nnx.Module):
        return _of_nnx(model, nnx), ""
    if equinox and _contains(model, equinox.Module):
        return _of_equinox(model, equinox), ""
    if callable(model):
        return found_in_init(model), ""
    hint = _NNX_HINT if nnx and isinstance(model, nnx.State) else HINT
    leaves = jax.tree_util.tree_leaves_with_path(_parameters(model, linen))
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for _, leaf in leaves):
        raise TypeError(
            f"model must be a model, a function that initializes one, such as lambda: model.init(key, x), or its "
            f"parameters, not {type(model).__name__}"
        )
    return found_by_name({name_of_path(path): leaf for path, leaf in leaves}), hint


def _contains(tree: Any, kind: type) -> bool:
    return any(isinstance(node, kind) for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind)))


def _parameters(tree: Any, linen: Any) -> Any:
    """Return the parameters among the variables of a linen model, without the boxes around sharded ones."""
    if isinstance(tree, Mapping) and isinstance(inside := tree.get("params"), Mapping):
        tree = inside
    return linen.meta.unbox(tree) if linen else tree


def _of_nnx(model: Any, nnx: Any) -> Iterator[Found]:
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield _decided(model, path, variable.get_value(), nnx.Module)


def _of_equinox(model: Any, equinox: Any) -> Iterator[Found]:
    is_array = lambda leaf: equinox.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(equinox.filter(model, is_array)):
        yield _decided(model, [key_of(part) for part in path], leaf, equinox.Module)


def _decided(model: Any, path: Iterable[Any], array: Any, module_class: type) -> Found:
    """Decide about a parameter by the innermost module on its path."""
    keys = [*path]
    owner, rest, node = model, keys, model
    for position, key in enumerate(keys):
        if isinstance(node, module_class):
            owner, rest = node, keys[position:]
        # A dictionary may have a key that is also the name of a method, such as "items".
        has_keys = isinstance(node, Mapping) or not (isinstance(key, str) and hasattr(node, key))
        node = node[key] if has_keys else getattr(node, key)
    name, path_name = "/".join(map(str, rest)), "/".join(map(str, keys))
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return Found(path_name, tuple(array.shape), Skip(f"dtype {array.dtype} has no mean"))
    return decision(owner, name, path_name, tuple(array.shape))
