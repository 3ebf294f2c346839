"""The class that defines a module, also for modules that torch.jit or torch.export have converted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

__all__ = ["defining_classes", "is_importable"]


def defining_classes(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """Return the class of each module; for a converted module, the class that it was an instance of.

    A class that is not imported is represented by an empty one of the same name, which is not importable.
    """
    recorded: dict[str, str | type] = {}
    classes: dict[nn.Module, type[nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            recorded |= {".".join(filter(None, (path, inner))): cls for inner, cls in _recorded(module)}
        found: str | type | None = None
        if isinstance(module, torch.jit.ScriptModule):
            found = _qualified_name(module)
        elif isinstance(module, torch.fx.GraphModule) or type(module) is nn.Module:  # of an exported program
            found = recorded.get(path)
        elif type(module).__module__ == "torch.export.unflatten":
            found = getattr(module, "type_name", str)()
        classes[module] = _class_named(found) if isinstance(found, str) and found else found or _own_class(module)
    return classes


def is_importable(cls: type) -> bool:
    """Return whether the class is found under its name in its module."""
    return _find(cls.__module__, cls.__qualname__) is cls


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls: type[nn.Module] = type_before_parametrizations(module)
    return cls


def _recorded(graph_module: torch.fx.GraphModule) -> Iterator[tuple[str, str | type]]:
    """Yield the path and the class of each module that the traced operations belonged to."""
    for node in graph_module.graph.nodes:
        yield from (node.meta.get("nn_module_stack") or {}).values()


def _qualified_name(module: torch.jit.ScriptModule) -> str:
    """Return the path of a class from that of its script type, such as ``__torch__.net.___torch_mangle_3.Net``."""
    pieces = module._c._type().qualified_name().split(".")
    return ".".join(piece for piece in pieces if piece != "__torch__" and not piece.startswith("___torch_mangle_"))


def _class_named(path: str) -> type[nn.Module]:
    pieces = path.split(".")
    for split in range(len(pieces) - 1, -1, -1):
        module = ".".join(pieces[:split]) or "__main__"
        if (found := _find(module, ".".join(pieces[split:]))) is not None:
            return found
    return type(pieces[-1], (nn.Module,), {"__module__": ".".join(pieces[:-1])})


def _find(module: str, path: str) -> type[nn.Module] | None:
    found: object = sys.modules.get(module)
    for piece in path.split("."):
        found = getattr(found, piece, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
