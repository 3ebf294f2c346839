"""The rule tables of libraries: one file each, read when a model has a class of that library, never importing it."""

from __future__ import annotations

import functools
import importlib
from fnmatch import fnmatchcase
from types import ModuleType

from gradcentral.layout.rules import Rule, Rules

__all__ = ["LIBRARIES", "is_convolution", "rules_of"]

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
"""Each has a file of its name here: ``TABLE``, a `LibraryTable`, and perhaps ``CONVOLUTIONS``, patterns of classes."""


def rules_of(cls: type) -> Rules:
    """The rules that a library's table has for this very class, in the table's order."""
    package, path = _library_and_path(cls)
    return _rules(package, path) if package in LIBRARIES else {}


def is_convolution(cls: type) -> bool:
    """Whether the class is one of its library's own convolutions."""
    package, path = _library_and_path(cls)
    patterns = getattr(_table_file(package), "CONVOLUTIONS", ()) if package in LIBRARIES else ()
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _library_and_path(cls: type) -> tuple[str, str]:
    package, _, path = f"{cls.__module__}.{cls.__qualname__}".partition(".")
    return package, path


@functools.cache  # keyed by text: holding on to classes would keep models alive
def _rules(package: str, path: str) -> Rules:
    rules: dict[str, Rule] = {}
    for pattern, of_class in _table_file(package).TABLE.items():
        if fnmatchcase(path, pattern):
            for name, rule in of_class.items():
                rules.setdefault(name, rule)
    return rules


def _table_file(package: str) -> ModuleType:
    return importlib.import_module(f"gradcentral.layout.libraries.{package}")
