"""Find the rule for a parameter of a module: registered, declared, of torch.nn, or from a library's table."""

from __future__ import annotations

import functools
import importlib
from fnmatch import fnmatchcase
from pkgutil import iter_modules

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gradcentral.layout import libraries
from gradcentral.layout.libraries import torch_nn
from gradcentral.layout.rules import Rule, Rules, declared_rules, matching_name, registered_rules

__all__ = ["LIBRARIES", "find_rule", "is_convolution", "library_rules"]

# All tables except that of torch.nn are looked up by the path of a class.
LIBRARIES = tuple(file.name for file in iter_modules(libraries.__path__) if file.name != "torch_nn")
# Convolutions of diffusers, timm and torchvision; those of torch.nn share a base class.
_CONVOLUTIONS = {"MotionConv2d", "SanaWMTemporalShortConvolution", "CondConv2d", "DeformConv2d"}


def find_rule(module: nn.Module, defined_by: type[nn.Module], name: str) -> tuple[Rule, str] | None:
    """Return the rule for a parameter of a module that a class defines, and the rule's origin; or None.

    The search follows the method resolution order of the class. For each class it tries, in this order, the rules
    registered for it, those it declares, those of torch.nn, and those of the library that defines it.
    """
    # A traced or exported module lacks the sizes that tell whether a subclass keeps its weights as torch.nn does.
    is_sized = isinstance(module, defined_by) or defined_by.__module__.startswith("torch.nn.")
    for cls in defined_by.__mro__:
        for origin, rules in (
            ("registered", registered_rules(cls)),
            ("declared", declared_rules(cls)),
            ("", torch_nn.TABLE.get(cls, {}) if is_sized else {}),
            (cls.__module__.partition(".")[0], library_rules(cls)),
        ):
            if (key := matching_name(rules, name)) is not None:
                return rules[key], f"{origin} {defined_by.__name__}.{name}".strip()
    return None


def is_convolution(cls: type[nn.Module]) -> bool:
    """Return whether a layer is centered under ``only="conv"``: a torch.nn convolution or a library's own."""
    return issubclass(cls, _ConvNd) or any(base.__name__ in _CONVOLUTIONS for base in cls.__mro__)


def library_rules(cls: type) -> Rules:
    """Return the rules in a library's table for this class itself. The library is not imported."""
    return _library_rules(f"{cls.__module__}.{cls.__qualname__}")


@functools.cache  # keyed by strings, since a cache of classes would keep them alive
def _library_rules(path: str) -> Rules:
    library, _, path_in_library = path.partition(".")
    rules: dict[str, Rule] = {}
    if library in LIBRARIES:
        for class_path, class_rules in importlib.import_module(f"gradcentral.layout.libraries.{library}").TABLE.items():
            if fnmatchcase(path_in_library, class_path):
                rules |= {name: rule for name, rule in class_rules.items() if name not in rules}
    return rules
