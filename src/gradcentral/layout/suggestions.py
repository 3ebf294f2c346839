"""Code to paste for the parameters that no rule covers: rules for their classes, or overrides by their names."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from glob import escape
from typing import NamedTuple

from torch import nn

from gradcentral.layout.classes import is_importable
from gradcentral.layout.probable import probable_pattern
from gradcentral.layout.sites import Site

__all__ = ["suggestions"]


class _Target(NamedTuple):
    """The parameters that one registered rule decides."""

    cls: type[nn.Module]
    pieces: tuple[str | None, ...]  # of the parameter's name in the class; None for any

    @property
    def name(self) -> str:
        return ".".join("*" if piece is None else escape(piece) for piece in self.pieces)

    def decides(self, name: tuple[str, ...]) -> bool:
        return len(name) == len(self.pieces) and all(map(_matches, self.pieces, name))


def _matches(wanted: str | None, piece: str) -> bool:
    return wanted in (None, piece)


def suggestions(unknown: Sequence[Site], found: Sequence[Site]) -> dict[str, str]:
    """Return {name: code} for unknown parameters among all of a model's parameters.

    The code skips the parameter, or centers it if its axes are probable or once it is edited. A rule for a class is
    suggested only if it decides parameters of the same kind; all other parameters share one call with overrides.
    """
    named: dict[tuple[str, ...], list[Site]] = {}  # by the name in the class
    for site in found:
        named.setdefault(tuple(site.owner.name.split(".")), []).append(site)
    tensors = {id(site.tensor) for site in unknown}
    targets: dict[_Target, list[Site]] = {}
    accepted: dict[_Target, bool] = {}
    by_name = []
    for site in (site for site in unknown if site.tensor.requires_grad):
        for target in _targets(site):
            if target not in accepted:
                accepted[target] = _decides_one_kind(target, named, tensors)
            if accepted[target]:
                targets.setdefault(target, []).append(site)
                break
        else:
            by_name.append(site)
    code = dict.fromkeys((site.name for site in by_name), _overrides(by_name))
    for target, sites in targets.items():
        code |= dict.fromkeys((site.name for site in sites), _registration(target, sites))
    return code


def _targets(site: Site) -> Iterable[_Target]:
    """Yield what a rule for the class can refer to: all items of a list, or the parameter by its own name."""
    cls, name = site.owner.cls, site.owner.name
    if site.owner.skip is not None or cls.__module__.startswith("torch.") or not is_importable(cls):
        return
    first, *rest = name.split(".")
    if rest and isinstance(site.modules[-1], (nn.ParameterList, nn.ParameterDict)):
        yield _Target(cls, (first, *[None] * len(rest)))
    if len(rest) > 1:
        yield _Target(cls, (first, *[None] * len(rest[:-1]), rest[-1]))
    yield _Target(cls, (first, *rest))


def _decides_one_kind(target: _Target, named: dict[tuple[str, ...], list[Site]], unknown: set[int]) -> bool:
    """Return whether a rule decides unknown parameters only, which have the same axes."""
    names = filter(target.decides, named)
    decided = [site for name in names for site in named[name] if issubclass(site.owner.cls, target.cls)]
    if not all(id(site.tensor) in unknown for site in decided):
        return False
    # The items of a list may be of different kinds although they have the same number of axes.
    shapes = {tuple(site.tensor.shape) for site in decided}
    is_alike = len(shapes if None in target.pieces else set(map(len, shapes))) == 1
    return is_alike and len({_probable(site) for site in decided}) == 1


def _registration(target: _Target, sites: Sequence[Site]) -> str:
    module, path = target.cls.__module__, target.cls.__qualname__
    line = f"gradcentral.register_layout({path}, {_quoted(target.name)}, {_rule(sites[0])})  # {_choices(sites)}"
    # Scripts and task files are executed, not imported: the line belongs inside them.
    is_executed = module == "__main__" or getattr(sys.modules[module], "__spec__", None) is None
    return line if is_executed else f"from {module} import {path.partition('.')[0]}; {line}"


def _overrides(sites: Sequence[Site]) -> str:
    pairs = [(f"{_quoted(site.name)}: {_rule(site)}", _choices([site])) for site in sites]
    if len(pairs) == 1:
        return f"layout = gradcentral.weight_layout(model, overrides={{{pairs[0][0]}}})  # {pairs[0][1]}"
    lines = [f"    {pair},  # {choices}" for pair, choices in pairs]
    return "\n".join(["layout = gradcentral.weight_layout(model, overrides={", *lines, "})"])


def _rule(site: Site) -> str:
    return _quoted(pattern) if (pattern := _probable(site)) else "None"


def _probable(site: Site) -> str:
    module, cls, name, skip = site.owner
    return "" if skip else probable_pattern(module, cls, name, site.tensor)


def _choices(sites: Sequence[Site]) -> str:
    """Return a comment with the shapes, and what can be written in place of the rule."""
    shapes = list(dict.fromkeys(tuple(site.tensor.shape) for site in sites))
    text = ", ".join("×".join(map(str, shape)) for shape in shapes[:3]) + ", …" * (len(shapes) > 3)
    if _probable(sites[0]):
        return f"{text}: the probable axes, to check; None to skip it"
    match len(shapes[0]):
        case 1:
            units = _common_divisor([size for (size,) in shapes])
            choices = ', "[i]" if it is one unit' + f', "({units} [i])" if it is {units} units, row by row' * bool(
                units
            )
        case 2:
            choices = ', "o [i]" if used as linear(x, w), "[i] o" if as x @ w'
        case dims:
            choices = f', or brackets around the axes that one output unit sums over, as in "o [i{" i" * (dims - 2)}]"'
    return f"{text}: None to skip it{choices}"


def _common_divisor(sizes: Sequence[int]) -> int | None:
    """Return the smallest common divisor, except for 1, that leaves at least two elements of each size."""
    common = math.gcd(*sizes)
    return next((d for d in range(2, common + 1) if common % d == 0 and min(sizes) // d > 1), None)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
