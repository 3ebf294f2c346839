"""What a rule is, the rules that users register, and how the rule for a parameter is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from gradcentral.vectors import WeightVectors

__all__ = ["Decision", "LeaveAlone", "Rule", "Table", "find_rule", "register_layout"]


@dataclass(frozen=True)
class LeaveAlone:
    """A rule's answer for a parameter that is not to be centered.

    Args:
        reason: why, in a few words; shown in the layout's table and in ``layout.skipped``.
        unknown: nobody has decided about this parameter; it deserves a look.
    """

    reason: str
    unknown: bool = False


Decision: TypeAlias = "WeightVectors | LeaveAlone"
Rule: TypeAlias = "Decision | Callable[[nn.Module, Tensor], Decision | None] | None"
Table: TypeAlias = "Mapping[type[nn.Module], Mapping[str, Rule]]"

_registered: dict[type[nn.Module], dict[str, Rule]] = {}


def register_layout(cls: type[nn.Module], name: str, rule: Rule) -> None:
    """Teach gradcentral which elements of a layer's parameter make one weight vector.

    Args:
        cls: the layer's class; the rule holds for its subclasses too, unless they have one of their own.
        name: the parameter's attribute name, or a pattern such as ``"experts.*"`` (as in `fnmatch`) that also
            names the items of a ParameterList.
        rule: a `WeightVectors`; or `LeaveAlone` (or None) for a parameter that is not to be centered; or a
            function ``rule(module, tensor)`` that returns one of these.

    Raises:
        TypeError: cls is no module class, or rule is none of the above.

    Examples:
        A layer that computes ``x @ self.weight``, so that one unit's incoming weights are a column:

        >>> import torch, gradcentral
        >>> class Project(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(8, 3))
        >>> gradcentral.register_layout(Project, "weight", gradcentral.WeightVectors(span=(0,)))
        >>> gradcentral.weight_layout(Project())["weight"].fan_in
        8
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Module, not {cls!r}")
    check_rule(rule, f"rule for {cls.__name__}.{name}")
    _registered.setdefault(cls, {})[name] = rule


def check_rule(rule: object, what: str) -> None:
    """Refuse what is no rule, naming it."""
    if not (rule is None or isinstance(rule, (WeightVectors, LeaveAlone)) or callable(rule)):
        raise TypeError(
            f"{what} must be WeightVectors, LeaveAlone, None or a function of (module, tensor), not {rule!r}"
        )


def find_rule(module: nn.Module, name: str, table: Table) -> tuple[Rule, str] | None:
    """The rule for a module's parameter and where it stands, walking the bases from the class itself upwards."""
    for cls in type(module).__mro__:
        for origin, rules in (("registered", _registered), ("", table)):
            for pattern, rule in rules.get(cls, {}).items():
                if fnmatchcase(name, pattern):
                    where = f"{type(module).__name__}.{name}"
                    return rule, f"{origin} {where}".strip()
    return None


def apply_rule(rule: Rule, module: nn.Module, tensor: Tensor) -> Decision:
    """A rule's decision about one tensor, bound to its shape; fan-in 1 is left alone."""
    decided = rule(module, tensor) if callable(rule) else rule
    if decided is None:
        decided = LeaveAlone("a rule says so")
    if isinstance(decided, LeaveAlone):
        return decided
    if not isinstance(decided, WeightVectors):
        raise TypeError(f"must return WeightVectors, LeaveAlone or None, not {decided!r}")
    vectors = decided.for_shape(tuple(tensor.shape))
    if vectors.fan_in <= 1:
        return LeaveAlone("fan-in 1: centering would zero its gradient for ever")
    return vectors
