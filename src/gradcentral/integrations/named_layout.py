"""The layout of a model in JAX or Keras, whose parameters have names and shapes. Pure Python: no torch, no numpy."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from gradcentral.text_table import Row, aligned, merged
from gradcentral.weight_vectors import WeightVectors, as_vectors, check_pattern

__all__ = ["Found", "NamedEntry", "NamedLayout", "Rule", "Skip", "decide"]


@dataclass(frozen=True)
class Skip:
    """A decision to skip a parameter.

    Args:
        reason: why, in a few words; shown in the layout's table.
        unknown: no rule covers the parameter, so the user should check it.
    """

    reason: str
    unknown: bool = False


Rule: TypeAlias = "str | WeightVectors | Skip | None"
"""A pattern such as ``"[i] o"``, `WeightVectors`, or a `Skip`; None skips the parameter too."""


@dataclass(frozen=True)
class Found:
    """A parameter that an adapter found in a model.

    Args:
        name: its path, with slashes.
        shape: its shape.
        rule: what its layer's rule decides.
        origin: the rule, as library, class and parameter.
        aliases: further names of the same parameter, which overrides and ``exclude`` may use too.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    origin: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedEntry:
    """The layout of one parameter."""

    name: str
    shape: tuple[int, ...]
    vectors: WeightVectors | None  # None if the parameter is skipped
    origin: str = ""  # the rule that decided
    reason: str = ""  # why the parameter is skipped; empty if it is centered
    unknown: bool = False  # skipped because no rule covers it
    aliases: tuple[str, ...] = ()


class NamedLayout(Mapping[str, WeightVectors]):
    """The weight vectors of a model: a mapping from the name of each centered parameter to its `WeightVectors`.

    Iteration is over the centered parameters; printing shows a table.

    Attributes:
        entries: one `NamedEntry` per parameter, centered or skipped, in the model's order.
        hint: how the unknown parameters may become known, printed before the overrides for them.
    """

    def __init__(self, entries: Iterable[NamedEntry], hint: str = "") -> None:
        self.entries = tuple(entries)
        self.hint = hint
        self._by_name = {name: entry for entry in self.entries for name in (entry.name, *entry.aliases)}

    def __getitem__(self, name: str) -> WeightVectors:
        """Return the weight vectors of a parameter; a KeyError gives the reason if it is skipped."""
        if (entry := self._by_name.get(name)) is None:
            raise KeyError(f"{name!r} is not a parameter of the model that this layout was created for")
        if entry.vectors is None:
            raise KeyError(f"{name} is skipped: {entry.reason}")
        return entry.vectors

    def __contains__(self, name: object) -> bool:
        return (entry := self._by_name.get(str(name))) is not None and entry.vectors is not None

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.entries if entry.vectors is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def entry(self, name: str) -> NamedEntry | None:
        """Return the entry of a parameter, centered or skipped; None if the layout does not have it."""
        return self._by_name.get(name)

    @property
    def skipped(self) -> dict[str, str]:
        """{name: reason} of every parameter that is skipped."""
        return {entry.name: entry.reason for entry in self.entries if entry.vectors is None}

    @property
    def unknown(self) -> tuple[NamedEntry, ...]:
        """The entries skipped only because no rule covers them."""
        return tuple(entry for entry in self.entries if entry.unknown)

    def __str__(self) -> str:
        """Return a table in which repeated layers share a row; `table` can list each of them."""
        return self.table()

    __repr__ = __str__

    def table(self, *, every: bool = False) -> str:
        """Format the layout as text: parameter, shape, weight vectors (count × fan-in and pattern), rule or reason.

        With ``every``, repeated layers have one row each.
        """
        rows = [Row(_pieces(entry.name), _cells(entry)) for entry in self.entries]
        header = ("parameter", "shape", "weight vectors", "decided by")
        text = aligned([header, *((str(row), *row.cells) for row in (rows if every else merged(rows)))])
        return "\n\n".join(filter(None, (text, self.summary(), self.to_paste())))

    def summary(self) -> str:
        """Return one line with the number of centered parameters and their fraction of the elements."""
        total = sum(math.prod(entry.shape) for entry in self.entries)
        centered = sum(math.prod(entry.shape) for entry in self.entries if entry.vectors is not None)
        percent = f" ({centered / total:.1%} of the elements)" if total else ""
        unknown = f"; {len(self.unknown)} skipped as unknown" if self.unknown else ""
        return f"{len(self)} of {len(self.entries)} parameters are centered{percent}{unknown}"

    def to_paste(self) -> str:
        """Format the hint and overrides for the unknown parameters, to paste and edit; empty if there are none."""
        lines = [f"  {json.dumps(entry.name)}: None,  # {_choices(entry.shape)}" for entry in self.unknown]
        heading = "Overrides for the unknown parameters, to paste and edit:"
        text = "\n".join([heading, "overrides={", *lines, "}"])
        return "\n\n".join(filter(None, (self.hint, text))) if lines else ""


def decide(
    found: Sequence[Found],
    overrides: Mapping[str, Rule] | None = None,
    exclude: Iterable[str] = (),
    hint: str = "",
) -> NamedLayout:
    """Create a layout from the parameters that an adapter found.

    Args:
        found: the parameters with the decisions of their layers' rules.
        overrides: {name: rule}, where the name may have wildcards as in ``fnmatch``; ``**/proj/kernel`` also matches
            ``proj/kernel``. The last match applies.
        exclude: names to skip, with or without wildcards.
        hint: how the unknown parameters may become known.

    Raises:
        ValueError: a name matches no parameter; an override is malformed, does not fit the shape or gives a fan-in of
            1.
        TypeError: an override is not a rule.
    """
    overrides, exclude = dict(overrides or {}), [exclude] if isinstance(exclude, str) else [*exclude]
    names = [name for parameter in found for name in (parameter.name, *parameter.aliases)]
    for option, texts in (("overrides", list(overrides)), ("exclude", exclude)):
        for text in texts:
            if not any(_matches(text, name) for name in names):
                near = difflib.get_close_matches(text, names, n=3)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"{option}: {text!r} matches no parameter of the model{hint}")
    for text, rule in overrides.items():
        _check_rule(rule, f"overrides[{text!r}]")
    return NamedLayout((_entry(parameter, overrides, exclude) for parameter in found), hint)


def _entry(parameter: Found, overrides: dict[str, Rule], exclude: Sequence[str]) -> NamedEntry:
    names = (parameter.name, *parameter.aliases)
    rule, origin = parameter.rule, parameter.origin
    for text, override in reversed(overrides.items()):
        if any(_matches(text, name) for name in names):
            rule, origin = override, "override"
            break
    else:
        if any(_matches(text, name) for text in exclude for name in names):
            rule, origin = Skip("excluded"), "exclude"
    try:
        decision = _apply(rule, parameter.shape)
        if origin == "override" and rule is not None and not isinstance(rule, Skip) and isinstance(decision, Skip):
            raise ValueError(f"shape {parameter.shape}: {decision.reason}")
    except ValueError as error:
        what = "overrides" if origin == "override" else f"the rule for {origin}"
        raise ValueError(f"{what}: {parameter.name}: {error}") from None
    name, *aliases = names
    if isinstance(decision, Skip):
        return NamedEntry(name, parameter.shape, None, origin, decision.reason, decision.unknown, tuple(aliases))
    return NamedEntry(name, parameter.shape, decision, origin, aliases=tuple(aliases))


def _apply(rule: Rule, shape: tuple[int, ...]) -> WeightVectors | Skip:
    if rule is None:
        return Skip("skipped by a rule")
    if isinstance(rule, Skip):
        return rule
    vectors = as_vectors(rule, shape)
    if vectors.fan_in > 1:
        return vectors
    return Skip(f"fan-in {vectors.fan_in}: {'its centered gradient is always zero' if vectors.fan_in else 'empty'}")


def _check_rule(rule: object, what: str) -> None:
    if isinstance(rule, str):
        try:
            check_pattern(rule)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    elif not (rule is None or isinstance(rule, (WeightVectors, Skip))):
        raise TypeError(f"{what} must be a pattern such as '[i] o', WeightVectors or None, not {rule!r}")


def _matches(text: str, name: str) -> bool:
    """Return whether a name is meant by a text: exactly, or by wildcards, where ``**/`` may match nothing."""
    return text == name or fnmatchcase(name, text) or (text.startswith("**/") and fnmatchcase(name, text[3:]))


def _pieces(name: str) -> tuple[str, ...]:
    """Cut a name around the numbers of layers: ``Dense_0/kernel``, ``layers/0/weight``, ``conv2_d_1/w``."""
    return tuple(re.split(r"(?:(?<=[_/])|^)(\d+)(?=/|$)", name))


def _cells(entry: NamedEntry) -> tuple[str, ...]:
    shape = "×".join(map(str, entry.shape))
    if (vectors := entry.vectors) is None:
        return shape, "–", entry.reason
    return shape, f"{vectors.count} × {vectors.fan_in}  {vectors.pattern}", entry.origin


def _choices(shape: tuple[int, ...]) -> str:
    """Return a comment with the shape, and what can be written in place of None."""
    text = "×".join(map(str, shape))
    match len(shape):
        case 0:
            return text or "a single number"
        case 1:
            return f'{text}; "[i]" if it is one unit'
        case 2:
            return f'{text}; "[i] o" if used as x @ w, "o [i]" if as w @ x'
        case dims:
            example = " ".join(["[k" + " k" * (dims - 3), "i]", "o"])
            return f'{text}; or brackets around the axes that one output unit sums over, as in "{example}"'
