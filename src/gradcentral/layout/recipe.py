"""Decide for every parameter of a model: overrides, exclusions, rules, and ties between them."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from gradcentral.layout.lookup import find_rule, is_convolution
from gradcentral.layout.rules import Decision, Entry, LeaveAlone, Rule, apply_rule, not_centerable
from gradcentral.layout.sites import Site, sites
from gradcentral.layout.table import suggestion
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Recipe", "Selector"]

Selector: TypeAlias = "str | Tensor | nn.Module"


class _Decided(NamedTuple):
    """A decision and the rule that it comes from."""

    decision: Decision
    origin: str


@dataclass(frozen=True)
class Recipe:
    """The options of `weight_layout`, kept so that a layout can be refreshed after the model has changed."""

    model: weakref.ref[nn.Module]
    only: str
    overrides: Mapping[Selector, Rule]
    exclude: list[Selector]

    def check_selectors(self, model: nn.Module) -> None:
        """Refuse selectors that match no parameter."""
        found = list(sites(model))
        for option, selectors in (("overrides", self.overrides), ("exclude", self.exclude)):
            for selector in selectors:
                if not any(_matches(selector, site) for site in found):
                    what = f"{selector!r}" if isinstance(selector, str) else f"a {type(selector).__name__}"
                    near = difflib.get_close_matches(str(selector), [site.name for site in found], n=3)
                    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                    raise ValueError(f"{option}: {what} matches no parameter of the model{hint}")

    def entries(self, model: nn.Module) -> list[Entry]:
        """One entry per parameter, in the model's order."""
        places: dict[Tensor, list[Site]] = {}
        for site in sites(model):
            places.setdefault(site.tensor, []).append(site)
        return [self._entry(places_of_one) for places_of_one in places.values()]

    def _entry(self, places: list[Site]) -> Entry:
        first = places[0]
        aliases = tuple(dict.fromkeys(site.name for site in places[1:]))
        decision, origin = self._decide(places)
        if isinstance(decision, WeightVectors):
            return Entry(first.name, first.tensor, decision, origin, aliases=aliases)
        line = suggestion(first) if decision.unknown else ""
        return Entry(first.name, first.tensor, None, origin, decision.reason, decision.unknown, aliases, line)

    def _decide(self, places: list[Site]) -> _Decided:
        if (reason := not_centerable(places[0].tensor)) is not None:
            return _Decided(reason, "")
        # The last override that matches applies, so that exceptions can follow a general rule.
        for selector, rule in reversed(list(self.overrides.items())):
            if any(_matches(selector, site) for site in places):
                return _Decided(_override(rule, places[0]), "override")
        if any(_matches(selector, site) for selector in self.exclude for site in places):
            return _Decided(LeaveAlone("excluded"), "exclude")
        first, *others = (_decided_by_rule(site, self.only) for site in places)
        for other, site in zip(others, places[1:], strict=True):
            if not _agree(first.decision, other.decision):
                owners = " and ".join(f"{_owner_class(tied)} ({tied.name})" for tied in (places[0], site))
                return _Decided(LeaveAlone(f"tied: {owners} use it differently"), first.origin)
        return first


def _decided_by_rule(site: Site, only: str) -> _Decided:
    found = find_rule(site.owner.module, site.owner.name)
    if found is None:
        if site.tensor.ndim <= 1:
            return _Decided(LeaveAlone("one-dimensional"), "")
        return _Decided(LeaveAlone(f"no rule for {_owner_class(site)}.{site.owner.name}", unknown=True), "")
    if site.owner.skip is not None:
        return _Decided(site.owner.skip, found.origin)
    decision = _apply(found.rule, site, f"{site.name}: the rule for {found.origin}")
    if only == "conv" and isinstance(decision, WeightVectors) and not is_convolution(site.owner.module):
        decision = LeaveAlone('not a convolution (only="conv")')
    return _Decided(decision, found.origin)


def _override(rule: Rule, site: Site) -> Decision:
    decision = _apply(rule, site, f"overrides: {site.name}")
    if isinstance(rule, (str, WeightVectors)) and isinstance(decision, LeaveAlone):
        raise ValueError(f"overrides: {site.name} of shape {tuple(site.tensor.shape)}: {decision.reason}")
    return decision


def _apply(rule: Rule, site: Site, what: str) -> Decision:
    try:
        return apply_rule(rule, site.owner.module, site.tensor)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from error


def _agree(one: Decision, other: Decision) -> bool:
    if isinstance(one, LeaveAlone) or isinstance(other, LeaveAlone):
        return isinstance(one, LeaveAlone) and isinstance(other, LeaveAlone)
    return one.agrees_with(other)


def _matches(selector: Selector, site: Site) -> bool:
    if isinstance(selector, str):
        return selector == site.name or fnmatchcase(site.name, selector)
    if isinstance(selector, nn.Module):
        return any(module is selector for module in site.modules)
    return site.tensor is selector


def _owner_class(site: Site) -> str:
    return str(type_before_parametrizations(site.owner.module).__name__)
