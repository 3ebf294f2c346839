"""Find the rule for a parameter of a module: registered, declared, of torch.nn, or from a library's table."""

from __future__ import annotations

import functools
import importlib
from fnmatch import fnmatchcase
from types import ModuleType
from typing import NamedTuple

from torch import nn

from gradcentral.layout.libraries import torch_nn
from gradcentral.layout.rules import Rule, Rules, declared_rules, matching_name, registered_rules

__all__ = ["LIBRARIES", "FoundRule", "find_rule", "is_convolution", "library_rules"]

LIBRARIES = (
    "diffusers",
    "monai",
    "open_clip",
    "peft",
    "timm",
    "torch_geometric",
    "torchvision",
    "transformers",
    "x_transformers",
)
"""Each has a file in ``libraries/`` with a ``TABLE`` and perhaps ``CONVOLUTIONS``, class paths with wildcards."""


class FoundRule(NamedTuple):
    """The rule for a parameter, and where it comes from."""

    rule: Rule
    origin: str


def find_rule(module: nn.Module, name: str) -> FoundRule | None:
    """The rule for a module's parameter, or None.

    Walks the bases of the module's class, from the class itself upwards. For each, in this order: the rules
    registered for it, those it declares, those of torch.nn, and those of the library that defines it.
    """
    for cls in type(module).__mro__:
        for origin, rules in (
            ("registered", registered_rules(cls)),
            ("declared", declared_rules(cls)),
            ("", torch_nn.TABLE.get(cls, {})),
            (cls.__module__.partition(".")[0], library_rules(cls)),
        ):
            if (key := matching_name(rules, name)) is not None:
                return FoundRule(rules[key], f"{origin} {type(module).__name__}.{name}".strip())
    return None


def library_rules(cls: type) -> Rules:
    """The rules in a library's table for this class itself. The library is not imported."""
    package, path = _library_and_path(cls)
    return _rules(package, path) if package in LIBRARIES else {}


def is_convolution(module: nn.Module) -> bool:
    """Whether the layer is centered under ``only="conv"``: a torch.nn convolution or a library's own."""
    return isinstance(module, torch_nn.CONVOLUTIONS) or any(map(_is_library_convolution, type(module).__mro__))


def _is_library_convolution(cls: type) -> bool:
    package, path = _library_and_path(cls)
    convolutions = getattr(_table_file(package), "CONVOLUTIONS", ()) if package in LIBRARIES else ()
    return any(fnmatchcase(path, convolution) for convolution in convolutions)


def _library_and_path(cls: type) -> tuple[str, str]:
    package, _, path = f"{cls.__module__}.{cls.__qualname__}".partition(".")
    return package, path


@functools.cache  # keyed by strings, since a cache of classes would keep them alive
def _rules(package: str, path: str) -> Rules:
    rules: dict[str, Rule] = {}
    for class_path, class_rules in _table_file(package).TABLE.items():
        if fnmatchcase(path, class_path):
            for name, rule in class_rules.items():
                rules.setdefault(name, rule)
    return rules


def _table_file(package: str) -> ModuleType:
    return importlib.import_module(f"gradcentral.layout.libraries.{package}")
