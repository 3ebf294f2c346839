"""Notice at each step, at little cost, that modules or parameters of a model have been added, removed or replaced."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

__all__ = ["Structure", "is_gathered"]


class Structure:
    """The parameters and modules that a model's modules have registered, to compare with their present state.

    It keeps no module alive.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        # A script module has no dictionaries; nor can it change.
        dictionaries = [m._parameters for m in modules if isinstance(m._parameters, dict) and m._parameters]
        self._dictionaries = dictionaries
        self._names = [*chain.from_iterable(dictionaries)]
        self._parameters = [*chain.from_iterable(map(dict.values, dictionaries))]
        containers = [m for m in modules if isinstance(m._modules, dict) and m._modules]
        self._containers = [weakref.ref(module) for module in containers]
        self._children = _children(containers)
        # Another module can have the id of a freed one.
        self._freed: list[object] = []
        self._watched = [weakref.ref(module, self._freed.append) for module in modules]

    def is_current(self) -> bool:
        """Return whether the modules still have the same parameters and modules under the same names."""
        if self._freed:
            return False
        parameters = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        return (
            len(parameters) == len(self._parameters)
            and all(map(operator.is_, parameters, self._parameters))
            and [*chain.from_iterable(self._dictionaries)] == self._names
            and _children([module for ref in self._containers if (module := ref())]) == self._children
        )


def is_gathered(parameter: Tensor, now: Tensor | None) -> bool:
    """Return whether ``now`` is the gathered form that FSDP2 temporarily puts in place of a sharded parameter."""
    return now is not None and _mesh_dimensions(now) < _mesh_dimensions(parameter)


def _children(modules: Iterable[nn.Module]) -> list[int]:
    return [*map(id, chain.from_iterable([module._modules.values() for module in modules]))]


def _mesh_dimensions(tensor: Tensor) -> int:
    mesh = getattr(tensor, "device_mesh", None)
    return 0 if mesh is None else int(mesh.ndim)
