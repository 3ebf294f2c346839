"""Rules for the parameters of a module class, and their registration for a user's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradcentral.weight_vectors import WeightVectors, as_vectors, check_pattern

__all__ = ["Entry", "LeaveAlone", "axes", "register_layout"]

LAZY = "lazy: its shape is unknown until the first forward"


@dataclass(frozen=True)
class LeaveAlone:
    """A rule that skips a parameter.

    Args:
        reason: why, in a few words; shown in the layout's table and in ``layout.skipped``.
        unknown: no rule covers the parameter, so the user should check it.
    """

    reason: str
    unknown: bool = False


@dataclass(frozen=True, eq=False)
class Entry:
    """The layout of one parameter."""

    name: str
    parameter: Tensor
    vectors: WeightVectors | None  # None if the parameter is skipped
    origin: str  # the rule that decided, as Class.parameter after the name of its library
    reason: str = ""  # why the parameter is skipped; empty if it is centered
    uncovered: bool = False  # skipped because no rule covers it
    aliases: tuple[str, ...] = ()  # further names of a tied parameter
    suggestion: str = ""  # code to paste, with a rule for an unknown parameter

    @property
    def unknown(self) -> bool:
        """Whether the user should check the parameter: no rule covers it, and it is trained."""
        return self.uncovered and self.parameter.requires_grad


Decision: TypeAlias = "WeightVectors | LeaveAlone"
Rule: TypeAlias = "str | Decision | Callable[[nn.Module, Tensor], str | Decision | None] | None"
Rules: TypeAlias = "Mapping[str, Rule]"
"""{parameter name, with wildcards: rule} of one class; the first name that matches decides."""
LibraryTable: TypeAlias = "Mapping[str, Rules]"
"""{path of a class inside its library, with wildcards: rules}, so that the library need not be imported."""

_registered: dict[type[nn.Module], dict[str, Rule]] = {}


def register_layout(cls: type[nn.Module], name: str, rule: Rule) -> None:
    """Register which elements of a layer's parameter form one weight vector.

    A class of your own can declare the same in a class attribute, without importing gradcentral:
    ``weight_vectors = {"weight": "[i] o"}``. A registered rule takes precedence over a declared one.

    Args:
        cls: the layer's class. The rule also applies to subclasses that have no rule of their own.
        name: the parameter's attribute name, with wildcards as in ``fnmatch``, which do not match dots. The exact
            name takes precedence over wildcards. A name with dots refers to items of a ParameterList
            (``"experts.*"``) or to parameters of direct submodules (``"proj.weight"``, or ``"blocks.*.weight"`` for a
            ModuleList), and takes precedence over their own rules.
        rule: a pattern such as ``"[i] o"`` (see `WeightVectors.parse`) or a `WeightVectors`; `LeaveAlone` or None to
            skip the parameter; or a function of (module, tensor) that returns one of these, such as
            `gradcentral.layout.axes`, which takes the sizes of split axes from the module.

    Raises:
        TypeError: cls is not a module class, or rule is none of the above.
        ValueError: the rule is a malformed pattern.

    Examples:
        A layer that computes ``x @ self.weight``, so that the incoming weights of a unit are a column:

        >>> import torch, gradcentral
        >>> class Project(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(8, 3))
        >>> gradcentral.register_layout(Project, "weight", "[i] o")
        >>> gradcentral.weight_layout(Project())["weight"].fan_in
        8
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, not {cls!r}")
    check_rule(rule, f"rule for {cls.__name__}.{name}")
    _registered.setdefault(cls, {})[name] = rule


def registered_rules(cls: type) -> Rules:
    """Return the rules registered for this class itself, not for its bases."""
    return _registered.get(cls, {})


def declared_rules(cls: type) -> Rules:
    """Return the rules that the class itself declares in its attribute ``weight_vectors``."""
    declared = cls.__dict__.get("weight_vectors")
    if not isinstance(declared, Mapping):  # an unrelated attribute of the same name
        return {}
    for name, rule in declared.items():
        check_rule(rule, f"{cls.__name__}.weight_vectors[{name!r}]")
    return declared


def check_rule(rule: object, what: str) -> None:
    """Refuse a value that is not a rule, naming the option it was passed to."""
    if isinstance(rule, str):
        try:
            check_pattern(rule)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    elif not (rule is None or isinstance(rule, (WeightVectors, LeaveAlone)) or callable(rule)):
        raise TypeError(
            f"{what} must be a pattern such as '[i] o', WeightVectors, LeaveAlone, None or a function of "
            f"(module, tensor), not {rule!r}"
        )


def matching_name(rules: Rules, name: str) -> str | None:
    """Return the name in the rules that is a parameter's name, or else the first one that matches it."""
    if name in rules:
        return name
    pieces = name.split(".")
    for key in rules:
        wildcards = key.split(".")
        if len(wildcards) == len(pieces) and all(map(fnmatchcase, pieces, wildcards)):
            return key
    return None


def apply_rule(rule: Rule, module: nn.Module, tensor: Tensor) -> Decision:
    """Apply a rule to one tensor; return its weight vectors, or the reason why it is skipped."""
    decided = rule(module, tensor) if callable(rule) else rule
    if decided is None:
        return LeaveAlone("skipped by a rule")
    if isinstance(decided, LeaveAlone):
        return decided
    if not isinstance(decided, (str, WeightVectors)):
        raise TypeError(f"must return a pattern, WeightVectors, LeaveAlone or None, not {decided!r}")
    vectors = as_vectors(decided, tuple(tensor.shape))
    if vectors.fan_in > 1:
        return vectors
    return LeaveAlone(
        f"fan-in {vectors.fan_in}: {'its centered gradient is always zero' if vectors.fan_in else 'empty'}"
    )


def not_centerable(tensor: Tensor) -> LeaveAlone | None:
    """Return the reason to skip a tensor regardless of its rule, if there is one."""
    if is_lazy(tensor):
        return LeaveAlone(LAZY)
    if tensor.is_nested:
        return LeaveAlone("nested tensor: its parts differ in shape")
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize == 1:  # also float8, float4
        return LeaveAlone(f"dtype {str(tensor.dtype).removeprefix('torch.')} has no mean")
    if tensor.layout != torch.strided:
        return LeaveAlone(f"{str(tensor.layout).removeprefix('torch.')} layout: centering would fill in its zeros")
    if not _has_mean(tensor):
        return LeaveAlone(f"{type(tensor).__name__} does not implement the mean")
    return None


def too_few_axes(tensor: Tensor) -> LeaveAlone:
    """Return the reason to skip a tensor of fewer than two axes without a rule."""
    return LeaveAlone("one-dimensional" if tensor.ndim else "a single number")


def shape_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a parameter; None if it is lazy or a nested tensor, which have no fixed shape."""
    return None if is_lazy(tensor) or tensor.is_nested else tuple(tensor.shape)


_classes_with_mean: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _has_mean(tensor: Tensor) -> bool:
    """Return whether a tensor's class implements the mean, which packed and quantized tensors may not."""
    kind = type(tensor)
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if not own or hasattr(tensor, "device_mesh"):  # the mean of a DTensor would communicate
        return True
    if kind not in _classes_with_mean:
        try:
            with torch.no_grad():
                tensor.detach().mean()
        except Exception:  # a subclass may raise anything
            _classes_with_mean[kind] = False
        else:
            _classes_with_mean[kind] = True
    return _classes_with_mean[kind]


def axes(pattern: str, **sizes: str) -> Rule:
    """Return a rule for a pattern (see `WeightVectors.parse`) that takes the sizes of named axes from the module.

    Args:
        pattern: names of the axes, with brackets around those that one weight vector runs over.
        sizes: for a named axis, the attribute of the module that holds its size, as in ``o="out_features"``, or a
            quotient of two, as in ``i="in_channels/groups"``; ignored if the module lacks it. A parameter that does
            not fit is skipped as unknown.

    Examples:
        >>> import torch
        >>> rule = axes("[i] o", o="units")
        >>> layer = torch.nn.Module()
        >>> layer.units = 3
        >>> rule(layer, torch.zeros(4, 3)).span
        (0,)
        >>> rule(layer, torch.zeros(3, 4))
        LeaveAlone(reason="shape (3, 4) does not fit Module: expected '[i] o' with o = units = 3", unknown=True)
    """
    check_pattern(pattern)

    def rule(module: nn.Module, tensor: Tensor) -> Decision:
        found = {name: size_of(module, attribute) for name, attribute in sizes.items()}
        # A tuple gives the sizes of a repeated axis; elsewhere it has another meaning, such as bipartite channels.
        kinds = {name: (int, tuple) if f"{name}..." in pattern else int for name in sizes}
        known = {name: size for name, size in found.items() if isinstance(size, kinds[name])}
        try:
            return WeightVectors.parse(pattern, tensor.shape, **known)
        except ValueError:
            return unexpected_sizes(module, tensor, pattern, sizes)

    return rule


def size_of(module: nn.Module, attribute: str) -> Any:
    """Return an attribute, or the quotient of two, such as ``in_channels/groups``; None if the module lacks it."""
    name, _, divisor = attribute.partition("/")
    size = getattr(module, name, None)
    if not divisor:
        return size
    parts = getattr(module, divisor, None)
    return size // parts if isinstance(size, int) and isinstance(parts, int) and parts else None


def unexpected_shape(module: nn.Module, tensor: Tensor, expected: str) -> LeaveAlone:
    """Return a decision to skip as unknown: the layer was modified, or the rule was written for another layer."""
    name = getattr(module, "original_name", type(module).__name__)  # of a scripted module
    return LeaveAlone(f"shape {tuple(tensor.shape)} does not fit {name}: expected {expected}", unknown=True)


def unexpected_sizes(module: nn.Module, tensor: Tensor, pattern: str, sizes: Mapping[str, str]) -> LeaveAlone:
    """Return the same with the sizes of the axes that are named in a pattern, given the attributes that hold them."""
    found = {name: size_of(module, attribute) for name, attribute in sizes.items()}
    where = ", ".join(f"{name} = {sizes[name]} = {size}" for name, size in found.items() if size is not None)
    lacks = ", ".join(sizes[name] for name, size in found.items() if size is None)
    expected = f"{pattern!r}{' with ' * bool(where)}{where}"
    return unexpected_shape(module, tensor, expected + f" (the module lacks {lacks})" * bool(lacks))
