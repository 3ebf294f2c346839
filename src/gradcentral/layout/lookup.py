"""How the rule for a parameter is found."""

from __future__ import annotations

from torch import nn

from gradcentral.layout import library_tables
from gradcentral.layout.libraries import torch_nn
from gradcentral.layout.rules import Rule, declared_rules, matching_rule, registered_rules

__all__ = ["find_rule", "is_convolution"]


def find_rule(module: nn.Module, name: str) -> tuple[Rule, str] | None:
    """The rule for a module's parameter and where it stands.

    Walks the class's bases from the class itself upwards. At each: the rules registered for it, those it declares
    itself, those of torch.nn, those of the library it comes from.
    """
    for cls in type(module).__mro__:
        for origin, rules in (
            ("registered", registered_rules(cls)),
            ("declared", declared_rules(cls)),
            ("", torch_nn.TABLE.get(cls, {})),
            (cls.__module__.partition(".")[0], library_tables.rules_of(cls)),
        ):
            found, rule = matching_rule(rules, name)
            if found:
                return rule, f"{origin} {type(module).__name__}.{name}".strip()
    return None


def is_convolution(module: nn.Module) -> bool:
    """Whether ``only="conv"`` means this layer: a torch.nn convolution, or a library's own."""
    return isinstance(module, torch_nn.CONVOLUTIONS) or any(map(library_tables.is_convolution, type(module).__mro__))
