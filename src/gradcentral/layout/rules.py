"""What a rule is, how it is applied, and the two ways in which users give rules for layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from gradcentral.weight_vectors import WeightVectors

__all__ = [
    "Decision",
    "LeaveAlone",
    "LibraryTable",
    "Rule",
    "Rules",
    "Table",
    "apply_rule",
    "check_rule",
    "matching_rule",
    "register_layout",
]


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
Rules: TypeAlias = "Mapping[str, Rule]"
"""{parameter name or pattern: rule} of one class; the first pattern that matches decides."""
Table: TypeAlias = "Mapping[type[nn.Module], Rules]"
LibraryTable: TypeAlias = "Mapping[str, Rules]"
"""{pattern of a class's path inside its library: rules}, so that the library need not be imported."""

CLASS_ATTRIBUTE = "weight_vectors"

_registered: dict[type[nn.Module], dict[str, Rule]] = {}


def register_layout(cls: type[nn.Module], name: str, rule: Rule) -> None:
    """Teach gradcentral which elements of a layer's parameter make one weight vector.

    For a class of your own, an attribute of the class says the same, and gradcentral need not be imported before
    the layer is used: ``weight_vectors = {"weight": WeightVectors(span=(0,))}``. A registered rule beats it.

    Args:
        cls: the layer's class; the rule holds for its subclasses too, unless they have one of their own.
        name: the parameter's attribute name, or a pattern (as in `fnmatch`, matched piece by piece between the
            dots). A name with dots reaches into the items of a ParameterList (``"experts.*"``) and into direct
            submodules (``"proj.weight"``, ``"blocks.*.weight"`` for a ModuleList), whose own rules it beats.
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


def registered_rules(cls: type) -> Rules:
    """What `register_layout` was told about this very class."""
    return _registered.get(cls, {})


def declared_rules(cls: type) -> Rules:
    """What the class itself declares in its attribute ``weight_vectors``."""
    declared = cls.__dict__.get(CLASS_ATTRIBUTE)
    if not isinstance(declared, Mapping):  # somebody else's attribute of the same name
        return {}
    for name, rule in declared.items():
        check_rule(rule, f"{cls.__name__}.{CLASS_ATTRIBUTE}[{name!r}]")
    return declared


def check_rule(rule: object, what: str) -> None:
    """Refuse what is no rule, naming it."""
    if not (rule is None or isinstance(rule, (WeightVectors, LeaveAlone)) or callable(rule)):
        raise TypeError(
            f"{what} must be WeightVectors, LeaveAlone, None or a function of (module, tensor), not {rule!r}"
        )


def matching_rule(rules: Rules, name: str) -> tuple[bool, Rule]:
    """Whether one of the rules is for this parameter, and which (None is a rule too)."""
    pieces = name.split(".")
    for pattern, rule in rules.items():
        patterns = pattern.split(".")
        if len(patterns) == len(pieces) and all(map(fnmatchcase, pieces, patterns)):
            return True, rule
    return False, None


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
