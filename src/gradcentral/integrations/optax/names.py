"""The names of the leaves of a tree of parameters, and the entries of a layout by these names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from gradcentral.integrations.named_layout import NamedEntry, NamedLayout

__all__ = ["Names", "key_of", "name_of_path"]


def key_of(part: Any) -> Any:
    """Return what a part of a path holds: an attribute's name, a dictionary's key or a position."""
    match part:
        case DictKey() | FlattenedIndexKey():
            return part.key
        case GetAttrKey():
            return part.name
        case SequenceKey():
            return part.idx
        case _:
            return part


def name_of_path(path: Sequence[Any]) -> str:
    """Return the name of a leaf: the parts of its path, with slashes."""
    return "/".join(str(key_of(part)) for part in path)


def _bare(name: str) -> str:
    return name.removeprefix("params/").removesuffix("/value")


class Names:
    """The entries of a layout, found by the paths of the tree that an optimizer is given."""

    def __init__(self, layout: NamedLayout) -> None:
        self._layout = layout

    def entry(self, path: Sequence[Any], leaf: Any) -> NamedEntry:
        """Return the entry of a leaf.

        Raises:
            ValueError: the layout does not have it, or has it in another shape.
        """
        name = name_of_path(path)
        # The optimizer may be given all variables of a Flax model, and the boxes around its parameters.
        for alias in (name, name.removeprefix("params/"), name.removesuffix("/value"), _bare(name)):
            if (found := self._layout.entry(alias)) is not None:
                break
        else:
            known = ", ".join(entry.name for entry in self._layout.entries[:3])
            raise ValueError(
                f"{name or 'a single array'} is not in the layout, which has {known}, …: create the layout from the "
                "parameters that the optimizer is initialized with, or from their model. If parameters are flattened, "
                "as by optax.flatten, call centralize outside of it"
            )
        if found.vectors is not None and tuple(jnp.shape(leaf)) != found.shape:
            raise ValueError(
                f"{name} has shape {tuple(jnp.shape(leaf))}, but {found.shape} in the layout: create the layout from "
                "these parameters or their model. In shard_map, which passes parts, call optimizer.update outside of it"
            )
        return found

    def map(self, function: Callable[..., jax.Array], tree: Any, *arguments: Any, beside: Any = None) -> Any:
        """Apply a function of (array, weight vectors, *arguments) to each centered leaf, and return the new tree.

        If ``beside`` is given, a tree of the same structure, its leaf is the last argument. A leaf may be None, as
        where a parameter has no gradient.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
        others = [()] * len(leaves) if beside is None else [(leaf,) for leaf in structure.flatten_up_to(beside)]
        result = []
        for (path, leaf), other in zip(leaves, others, strict=True):
            vectors = None if leaf is None else self.entry(path, leaf).vectors
            result.append(leaf if vectors is None else function(leaf, vectors, *arguments, *other))
        return structure.unflatten(result)
