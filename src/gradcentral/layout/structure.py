"""Notice at each step, at little cost, that modules or parameters of a model have been added, removed or replaced."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

__all__ = ["Structure", "is_gathered"]


class Structure:
    """The parameters and modules that the modules of some models contain, to compare with their present state."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        roots = [*roots]
        found = [d for root in roots for module in root.modules() for d in (module._parameters, module._modules)]
        # A script module has no dictionaries; nor can it change.
        self._contents: list[dict[str, Any]] = [d for d in found if isinstance(d, dict) and d]
        self._views = [contents.values() for contents in self._contents]
        self._objects = [*chain.from_iterable(self._views)]
        self._names = [*chain.from_iterable(self._contents)]
        kept: list[list[Any]] = [self._contents, self._views, self._objects, self._names]

        def release(_: object) -> None:
            for each in kept:
                each.clear()

        # The dictionaries must not keep the layers of a model alive that no longer exists.
        self._roots = [weakref.ref(root, release) for root in roots]

    def is_current(self) -> bool:
        """Return whether the modules still contain the same parameters and modules under the same names."""
        objects = [*chain.from_iterable(self._views)]
        return (
            len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
            and [*chain.from_iterable(self._contents)] == self._names
        )


def is_gathered(parameter: Tensor, now: Tensor | None) -> bool:
    """Return whether ``now`` is the gathered form that FSDP2 temporarily puts in place of a sharded parameter."""
    return now is not None and _mesh_dimensions(now) < _mesh_dimensions(parameter)


def _mesh_dimensions(tensor: Tensor) -> int:
    mesh = getattr(tensor, "device_mesh", None)
    return 0 if mesh is None else int(mesh.ndim)
