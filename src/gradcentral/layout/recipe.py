"""Decide for every parameter of a model: overrides, exclusions, rules, and ties between them."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from gradcentral.layout.lookup import find_rule, is_convolution
from gradcentral.layout.reasons import without_rule
from gradcentral.layout.rules import Decision, Entry, LeaveAlone, Rule, apply_rule, not_centerable
from gradcentral.layout.sites import Site, sites
from gradcentral.layout.suggestions import suggestions
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Recipe", "Selector"]

Selector: TypeAlias = "str | Tensor | nn.Module"


@dataclass(frozen=True)
class Recipe:
    """The options of `weight_layout`, kept so that a layout can be refreshed after the model has changed."""

    roots: Sequence[weakref.ref[nn.Module]]  # the model, or several that hold the parameters of one optimizer
    only: str
    overrides: Mapping[Selector, Rule]
    exclude: list[Selector]

    def models(self) -> list[nn.Module]:
        """Return the models, or nothing if one of them no longer exists."""
        models = [model for ref in self.roots if (model := ref()) is not None]
        return models if len(models) == len(self.roots) else []

    def model(self) -> nn.Module | None:
        """Return the model, or several in a ModuleList; None if one of them no longer exists."""
        models = self.models()
        return nn.ModuleList(models) if len(models) > 1 else next(iter(models), None)

    def check_selectors(self, model: nn.Module) -> None:
        """Refuse selectors that match no parameter."""
        found = list(sites(model))
        named = self._named(found)
        for option, selectors in (("overrides", self.overrides), ("exclude", self.exclude)):
            for selector in selectors:
                if not _matches(selector, found, named):
                    what = f"{selector!r}" if isinstance(selector, str) else f"a {type(selector).__name__}"
                    near = difflib.get_close_matches(str(selector), [site.name for site in found], n=3)
                    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                    raise ValueError(f"{option}: {what} matches no parameter of the model{hint}")

    def entries(self, model: nn.Module) -> list[Entry]:
        """Return one entry per parameter, in the model's order."""
        found = list(sites(model))
        named = self._named(found)
        places: dict[Tensor, list[Site]] = {}
        for site in found:
            places.setdefault(site.tensor, []).append(site)
        entries = [
            replace(self._entry_of_tied(tied, named), aliases=tuple(site.name for site in tied[1:]))
            for tied in places.values()
        ]
        code = suggestions([places[entry.parameter][0] for entry in entries if entry.uncovered], found)
        return [replace(entry, suggestion=code.get(entry.name, "")) for entry in entries]

    def _named(self, found: list[Site]) -> dict[str, set[str]]:
        """Return the names of parameters that each textual selector means."""
        names = [site.name for site in found]
        return {text: _selected(text, names) for text in (*self.overrides, *self.exclude) if isinstance(text, str)}

    def _entry_of_tied(self, places: list[Site], named: Mapping[str, set[str]]) -> Entry:
        first = places[0]
        if (reason := not_centerable(first.tensor)) is not None:
            return _entry(first, reason)
        # The last override that matches applies, so that exceptions can follow a general rule.
        for selector, rule in reversed(list(self.overrides.items())):
            if _matches(selector, places, named):
                decision = _apply(rule, first, f"overrides: {first.name}")
                if isinstance(rule, (str, WeightVectors)) and isinstance(decision, LeaveAlone):
                    shape = tuple(first.tensor.shape)
                    raise ValueError(f"overrides: {first.name} of shape {shape}: {decision.reason}")
                return _entry(first, decision, "override")
        if any(_matches(selector, places, named) for selector in self.exclude):
            return _entry(first, LeaveAlone("excluded"), "exclude")
        decided, *others = (_entry_by_rule(site, self.only) for site in places)
        for other, site in zip(others, places[1:], strict=True):
            if not _agree(decided.vectors, other.vectors):
                owners = " and ".join(f"{tied.owner.cls.__name__} ({tied.name})" for tied in (first, site))
                return _entry(first, LeaveAlone(f"tied: {owners} use it differently"), decided.origin)
        return decided


def _entry(site: Site, decision: Decision, origin: str = "") -> Entry:
    if isinstance(decision, WeightVectors):
        return Entry(site.name, site.tensor, decision, origin)
    return Entry(site.name, site.tensor, None, origin, decision.reason, decision.unknown)


def _entry_by_rule(site: Site, only: str) -> Entry:
    module, cls, name, skip = site.owner
    found = find_rule(module, cls, name)
    if found is None:
        return _entry(site, without_rule(module, cls, name, site.name, site.tensor))
    rule, origin = found
    decision = skip or _apply(rule, site, f"{site.name}: the rule for {origin}")
    if only == "conv" and isinstance(decision, WeightVectors) and not is_convolution(cls):
        decision = LeaveAlone('not a convolution (only="conv")')
    return _entry(site, decision, origin)


def _apply(rule: Rule, site: Site, what: str) -> Decision:
    try:
        return apply_rule(rule, site.owner.module, site.tensor)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from error


def _agree(one: WeightVectors | None, other: WeightVectors | None) -> bool:
    return one is other if one is None or other is None else one.agrees_with(other)


def _selected(text: str, names: list[str]) -> set[str]:
    """Return the name itself if there is one, else the names that match it as a pattern.

    Names from a ModuleDict or ParameterDict may have brackets, so that these are wildcards only as a second choice.
    """
    if text in names:
        return {text}
    for pattern in (text.replace("[", "[[]"), text):
        if matching := {name for name in names if fnmatchcase(name, pattern)}:
            return matching
    return set()


def _matches(selector: Selector, places: list[Site], named: Mapping[str, set[str]]) -> bool:
    if isinstance(selector, str):
        return any(site.name in named[selector] for site in places)
    return any(selector is found for site in places for found in (site.tensor, *site.modules))
