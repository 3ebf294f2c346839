"""For each parameter of a model: which elements make one weight vector, or why it is left alone."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations

from gradcentral.layout import table
from gradcentral.layout.entry import Entry
from gradcentral.layout.libraries import torch_nn
from gradcentral.layout.lookup import find_rule, is_convolution
from gradcentral.layout.rules import (
    Decision,
    LeaveAlone,
    Rule,
    apply_rule,
    check_rule,
    register_layout,
)
from gradcentral.layout.suggest import suggestion
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Entry", "LeaveAlone", "WeightLayout", "register_layout", "weight_layout"]

Selector: TypeAlias = "str | Tensor | nn.Module"

_ONLY = ("all", "conv")
_SHAPE_RULE = "shape rule"
_LAZY = "lazy: its shape is known after the first forward"


class WeightLayout(Mapping[Tensor, WeightVectors]):
    """The weight vectors of a model: a mapping from each centered parameter to its `WeightVectors`.

    Made by `weight_layout` or `WeightLayout.from_shapes`. Looks a parameter up by itself or by its name; iterates
    over the centered parameters; prints as a table.

    Attributes:
        entries: one `Entry` per parameter of the model, left alone or not, in the model's order.
        revision: how often `refresh` has decided anew.
    """

    def __init__(self, entries: Sequence[Entry], recipe: _Recipe | None = None) -> None:
        self._recipe = recipe
        self.revision = -1
        self._set(entries)

    def _set(self, entries: Sequence[Entry]) -> None:
        self.revision += 1
        self.entries = tuple(entries)
        self._by_parameter = {entry.parameter: entry for entry in self.entries}
        self._by_name = {name: entry for entry in self.entries for name in (entry.name, *entry.aliases)}
        self._centered = {entry.parameter: entry.vectors for entry in self.entries if entry.vectors is not None}
        self._pending = any(entry.reason == _LAZY for entry in self.entries)

    def __getstate__(self) -> tuple[Entry, ...]:
        # A copy goes with copied parameters, and the model it was made for is not theirs: it can't be refreshed.
        return self.entries

    def __setstate__(self, entries: tuple[Entry, ...]) -> None:
        self.__init__(entries)  # type: ignore[misc]

    @classmethod
    def from_shapes(
        cls, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, object]]
    ) -> WeightLayout:
        """A layout by the shape rule alone, for parameters known without their model: the mean over axes 1 and up.

        Right for plain Linear and convolution layers; **wrong** for embeddings, transposed convolutions and every
        layer that stores its weights as [in, out]. Prefer `weight_layout`, which looks at the modules.

        Args:
            params: parameters, (name, parameter) pairs, or an optimizer's ``param_groups``.

        Examples:
            >>> import torch
            >>> layout = WeightLayout.from_shapes([torch.zeros(4, 3), torch.zeros(4)])
            >>> len(layout), layout.skipped
            (1, {'1': 'one-dimensional'})
        """
        entries = []
        for position, (name, tensor) in enumerate(_named(params)):
            _refuse_flat(name or f"parameter {position}", tensor)
            decided: Decision
            if tensor.ndim <= 1:
                decided = LeaveAlone("one-dimensional")
            else:
                decided = apply_rule(WeightVectors(span=tuple(range(1, tensor.ndim))), nn.Module(), tensor)
            entries.append(_entry(name or str(position), tensor, _common_reason(tensor) or decided, _SHAPE_RULE))
        return cls(entries)

    def __getitem__(self, key: Tensor | str) -> WeightVectors:
        """The weight vectors of a parameter, given the parameter or its name.

        Raises:
            KeyError: the parameter is not in the layout, or is left alone (with the reason).
        """
        entry = self._by_name.get(key) if isinstance(key, str) else self._by_parameter.get(key)
        if entry is None:
            what = repr(key) if isinstance(key, str) else f"a tensor of shape {tuple(key.shape)}"
            raise KeyError(f"{what} is no parameter of this layout's model")
        if entry.vectors is None:
            raise KeyError(f"{entry.name} is left alone: {entry.reason}")
        return entry.vectors

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            key = entry.parameter if (entry := self._by_name.get(key)) else None
        return isinstance(key, Tensor) and key in self._centered

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._centered)

    def __len__(self) -> int:
        return len(self._centered)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def skipped(self) -> dict[str, str]:
        """{name: reason} of every parameter that is left alone."""
        return {entry.name: entry.reason for entry in self.entries if entry.vectors is None}

    @property
    def names(self) -> dict[Tensor, str]:
        """{parameter: name} of every parameter of the model, left alone or not."""
        return {entry.parameter: entry.name for entry in self.entries}

    @property
    def unknown(self) -> tuple[Entry, ...]:
        """The entries left alone only because no rule knows them: raw parameters and unexpected shapes."""
        return tuple(entry for entry in self.entries if entry.unknown)

    @property
    def pending(self) -> bool:
        """Whether lazy parameters still wait for the first forward."""
        return self._pending

    def knows(self, parameter: Tensor) -> bool:
        """Whether the parameter belongs to this layout's model, centered or left alone."""
        return parameter in self._by_parameter

    def refresh(self) -> None:
        """Decide anew for the model as it is now: lazy parameters have shapes, layers may have been added.

        Raises:
            RuntimeError: lazy parameters have got their shapes, but the layout knows no model to decide by: it was
                copied, or made from shapes, before the first forward.
        """
        if self._recipe is not None and (model := self._recipe.model()) is not None:
            self._set(self._recipe.entries(model))
        elif any(entry.reason == _LAZY and not is_lazy(entry.parameter) for entry in self.entries):
            raise RuntimeError(
                "this layout was copied, or made from shapes, before its lazy parameters had theirs, and knows no "
                "model to decide by: make the layout and the optimizer anew"
            )

    def standing(self) -> dict[str, Tensor] | None:
        """{name: parameter} of the model as it is now, tied ones under each of their names; None: no model is known.

        Raises:
            ValueError: the model has been wrapped in FSDP1 since, which flattens its parameters.
        """
        model = None if self._recipe is None else self._recipe.model()
        return None if model is None else {site.name: site.tensor for site in _sites(model)}

    @property
    def by_shape(self) -> bool:
        """Whether this is `from_shapes`' guess."""
        return any(entry.origin == _SHAPE_RULE for entry in self.entries)

    def __str__(self) -> str:
        """A table: parameter, shape, weight vectors (count × fan-in and the axes), rule or reason.

        Layers that repeat share a row; `table` can list each of them.
        """
        return self.table()

    __repr__ = __str__

    def table(self, *, every: bool = False) -> str:
        """The layout as text.

        Args:
            every: one row for every parameter, also where layers repeat.
        """
        parts = [table.render(self.entries, every=every), self.summary()]
        if self.suggestions:
            lines = "\n".join(f"  {line}" for line in self.suggestions)
            parts.append(f"To decide about the unknown, paste and edit:\n{lines}")
        return "\n\n".join(parts)

    @property
    def suggestions(self) -> tuple[str, ...]:
        """One line of code to paste for each kind of parameter that is left alone as unknown."""
        return tuple(dict.fromkeys(entry.suggestion for entry in self.unknown if entry.suggestion))

    def summary(self) -> str:
        """One line: how much of the model is centered."""
        line = _share_centered(self.entries, "parameters are centered")
        trained = [entry for entry in self.entries if entry.parameter.requires_grad]
        if len(trained) < len(self.entries):
            line += f"; of those that train, {_share_centered(trained, '')}"
        note = f"; {len(self.unknown)} left alone as unknown: have a look" if self.unknown else ""
        return line + note


def weight_layout(
    model: nn.Module,
    *,
    only: str = "all",
    overrides: Mapping[Selector, Rule] | None = None,
    exclude: Iterable[Selector] = (),
) -> WeightLayout:
    """Which elements of each of a model's parameters make one weight vector.

    Decided from the modules, not from shapes: the override, else the rule for (class, parameter name) walking up
    the class's bases, else the parameter is left alone and reported, never guessed.

    Args:
        model: the model.
        only: ``"all"``, or ``"conv"`` for the convolutions alone (the paper's GC on convolutions only).
        overrides: {which: rule}: a rule of your own for a parameter, given by itself, by its name or by a pattern
            of names (``"encoder.*.weight"``, as in `fnmatch`). A rule is `WeightVectors`, `LeaveAlone`, None
            (leave alone) or a function of (module, tensor).
        exclude: what to leave alone: names, patterns, parameters, or modules (all their parameters).

    Returns:
        A `WeightLayout`; print it to see the table.

    Raises:
        ValueError: ``only`` is unknown; an override or exclude matches no parameter, or does not fit its shape or
            gives a fan-in of 1; the model is wrapped in FSDP1, which flattens its parameters.
        TypeError: an override is no rule.

    Examples:
        >>> import torch, gradcentral
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> print(gradcentral.weight_layout(net, exclude=["2.*"]))
        parameter  shape    weight vectors       decided by
        ------------------------------------------------------
        0.weight   8×3×3×3  8 × 27 over 1, 2, 3  Conv2d.weight
        0.bias     8        –                    bias
        2.weight   10×288   –                    excluded
        2.bias     10       –                    excluded
        <BLANKLINE>
        1 of 4 parameters are centered (6.9% of the elements)
    """
    if only not in _ONLY:
        raise ValueError(f"only must be one of {', '.join(map(repr, _ONLY))}, not {only!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    chosen = [(selector, rule) for selector, rule in (overrides or {}).items()]
    for selector, rule in chosen:
        check_rule(rule, f"overrides[{selector!r}]")
    if isinstance(exclude, (str, Tensor, nn.Module)):
        exclude = [exclude]
    recipe = _Recipe(weakref.ref(model), only, chosen, list(exclude))
    recipe.check(model)
    return WeightLayout(recipe.entries(model), recipe)


class _Site(NamedTuple):
    """One place where a parameter stands in a model."""

    name: str
    tensor: Tensor
    owner: nn.Module
    """The module whose rule applies: for a parametrized tensor or a list's item, the module it belongs to."""
    local_name: str
    standing_for: LeaveAlone | None
    modules: tuple[nn.Module, ...]
    """The modules around it, outermost first."""


@dataclass(frozen=True)
class _Recipe:
    """How to decide about a model, now and again after it has changed."""

    model: weakref.ref[nn.Module]
    only: str
    overrides: list[tuple[Selector, Rule]]
    exclude: list[Selector]

    def check(self, model: nn.Module) -> None:
        """Refuse selectors that match nothing, and models whose parameters are not what their layers hold."""
        sites = list(_sites(model))
        for option, selectors in (("overrides", [which for which, _ in self.overrides]), ("exclude", self.exclude)):
            for selector in selectors:
                if not any(_matches(selector, site) for site in sites):
                    what = f"{selector!r}" if isinstance(selector, str) else f"a {type(selector).__name__}"
                    near = difflib.get_close_matches(str(selector), [site.name for site in sites], n=3)
                    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                    raise ValueError(f"{option}: {what} matches no parameter of the model{hint}")

    def entries(self, model: nn.Module) -> list[Entry]:
        places: dict[Tensor, list[_Site]] = {}
        for site in _sites(model):
            places.setdefault(site.tensor, []).append(site)
        return [self._entry(sites) for sites in places.values()]

    def _entry(self, sites: list[_Site]) -> Entry:
        first = sites[0]
        aliases = tuple(dict.fromkeys(site.name for site in sites[1:]))

        def entry(decided: Decision, origin: str) -> Entry:
            return _entry(first.name, first.tensor, decided, origin, aliases, first)

        if (common := _common_reason(first.tensor)) is not None:
            return entry(common, "")
        for rule in self._overriding(sites):
            return entry(_override(rule, first), "override")
        if any(_matches(selector, site) for selector in self.exclude for site in sites):
            return entry(LeaveAlone("excluded"), "exclude")
        decisions = [_decide(site, self.only) for site in sites]
        decided, origin = decisions[0]
        for (other, _), site in zip(decisions[1:], sites[1:], strict=True):
            if not _agree(decided, other):
                owners = f"{_class_name(first.owner)} ({first.name}) and {_class_name(site.owner)} ({site.name})"
                return entry(LeaveAlone(f"tied: {owners} read it differently"), origin)
        return entry(decided, origin)

    def _overriding(self, sites: list[_Site]) -> Iterator[Rule]:
        # The last one that matches wins, so that a general pattern can come first and its exceptions after it.
        for selector, rule in reversed(self.overrides):
            if any(_matches(selector, site) for site in sites):
                yield rule


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Every place a parameter stands, tied ones more than once."""
    paths: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        paths[path] = module
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters "
                "so that no weight vector is left to see: use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        around = tuple(paths[prefix] for prefix in _prefixes(path) if prefix in paths)
        for local_name, tensor in module._parameters.items():
            if tensor is None:
                continue
            name = f"{path}.{local_name}" if path else local_name
            _refuse_flat(name, tensor)
            owner, owned_name, standing_for = _owner(module, path, local_name, paths)
            yield _Site(name, tensor, owner, owned_name, standing_for, around)


def _prefixes(path: str) -> Iterator[str]:
    yield ""
    if path:
        parts = path.split(".")
        yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _owner(
    module: nn.Module, path: str, name: str, paths: dict[str, nn.Module]
) -> tuple[nn.Module, str, LeaveAlone | None]:
    """The module that computes with the parameter, and the name it has there."""
    if isinstance(module, ParametrizationList):
        above, _, tensor_name = path.rpartition(".")
        return paths[above.rpartition(".")[0]], tensor_name, torch_nn.unwrap_parametrization(module, name)
    while isinstance(module, (nn.ParameterList, nn.ParameterDict)) and path:
        path, _, last = path.rpartition(".")
        module, name = paths[path], f"{last}.{name}"
    if (standing_for := torch_nn.unwrap(module, name)) is not None:
        return (module, *standing_for)
    return (*(_speaking_for(path, name, paths) or (module, name)), None)


def _speaking_for(path: str, name: str, paths: dict[str, nn.Module]) -> tuple[nn.Module, str] | None:
    """The module around a layer, or around its ModuleList or ModuleDict, if it has a rule for the layer's parameter."""
    while path:
        path, _, last = path.rpartition(".")
        module, name = paths[path], f"{last}.{name}"
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return (module, name) if find_rule(module, name) else None
    return None


def _decide(site: _Site, only: str) -> tuple[Decision, str]:
    found = find_rule(site.owner, site.local_name)
    if found is None:
        if site.tensor.ndim <= 1:
            return LeaveAlone("one-dimensional"), ""
        where = f"{_class_name(site.owner)}.{site.local_name}"
        return LeaveAlone(f"no rule for {where}", unknown=True), ""
    rule, origin = found
    if site.standing_for is not None:
        return site.standing_for, origin
    try:
        decided = apply_rule(rule, site.owner, site.tensor)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{site.name}: the rule for {origin}: {error}") from error
    if only == "conv" and isinstance(decided, WeightVectors) and not is_convolution(site.owner):
        return LeaveAlone('no convolution (only="conv")'), origin
    return decided, origin


def _override(rule: Rule, site: _Site) -> Decision:
    try:
        decided = apply_rule(rule, site.owner, site.tensor)
    except (ValueError, TypeError) as error:
        raise type(error)(f"overrides: {site.name}: {error}") from error
    asked_to_center = isinstance(rule, WeightVectors)
    if asked_to_center and isinstance(decided, LeaveAlone):
        raise ValueError(f"overrides: {site.name} of shape {tuple(site.tensor.shape)}: {decided.reason}")
    return decided


def _common_reason(tensor: Tensor) -> LeaveAlone | None:
    """Why no rule may center this tensor, whatever its module."""
    if is_lazy(tensor):
        return LeaveAlone(_LAZY)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return LeaveAlone(f"dtype {str(tensor.dtype).removeprefix('torch.')} has no mean")
    return None


def _refuse_flat(name: str, tensor: Tensor) -> None:
    """Refuse what FSDP1 and DeepSpeed's ZeRO make of parameters: parts in which no weight vector can be seen."""
    whose = ""
    if getattr(tensor, "_fsdp_flattened", False):
        whose = "FullyShardedDataParallel (FSDP1)"
    elif hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape"):
        whose = "DeepSpeed ZeRO-3"
    if whose:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} is a flat part of a parameter, made by {whose}, in which no weight "
            "vector can be seen: use torch.distributed.fsdp.fully_shard (FSDP2), which keeps the shapes"
        )


def _agree(one: Decision, other: Decision) -> bool:
    if isinstance(one, LeaveAlone) or isinstance(other, LeaveAlone):
        return isinstance(one, LeaveAlone) and isinstance(other, LeaveAlone)
    return one.agrees_with(other)


def _matches(selector: Selector, site: _Site) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(site.name, selector)
    if isinstance(selector, nn.Module):
        return any(module is selector for module in site.modules)
    return site.tensor is selector


def _class_name(module: nn.Module) -> str:
    return str(type_before_parametrizations(module).__name__)


def _entry(
    name: str,
    tensor: Tensor,
    decided: Decision,
    origin: str,
    aliases: tuple[str, ...] = (),
    site: _Site | None = None,
) -> Entry:
    if isinstance(decided, LeaveAlone):
        suggested = suggestion(name, site.owner, site.local_name, tensor) if decided.unknown and site else ""
        return Entry(name, tensor, None, origin, decided.reason, decided.unknown, aliases, suggested)
    return Entry(name, tensor, decided, origin, aliases=aliases)


def _share_centered(entries: Sequence[Entry], what: str) -> str:
    centered = [entry for entry in entries if entry.vectors is not None]
    counted = sum(entry.parameter.numel() for entry in entries if not is_lazy(entry.parameter))
    elements = sum(entry.parameter.numel() for entry in centered)
    percent = f" ({elements / counted:.1%} of the elements)" if counted else ""
    return " ".join(f"{len(centered)} of {len(entries)} {what}".split()) + percent


def _named(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, object]],
) -> Iterator[tuple[str, Tensor]]:
    for item in params:
        if isinstance(item, Tensor):
            yield "", item
        elif isinstance(item, dict):
            group = item["params"]
            assert isinstance(group, Iterable)
            yield from _named([group] if isinstance(group, Tensor) else group)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            yield item
        else:
            raise TypeError(
                f"params must hold tensors, (name, tensor) pairs or param groups, not {type(item).__name__}"
            )
