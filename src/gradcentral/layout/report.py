"""The report of ``gradcentral layout``: the table and the decisions to check, as text or as a dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gradcentral.layout.layout import WeightLayout
from gradcentral.layout.libraries.torch_nn import has_uneven_phases
from gradcentral.layout.rules import Entry, shape_of
from gradcentral.layout.sites import sites
from gradcentral.layout.table import compact_names

__all__ = ["as_json", "as_text", "points_to_check"]

_SMALL_FAN_IN = 4  # up to this fan-in, centering removes a quarter or more of a unit's degrees of freedom


def as_text(model: nn.Module, layout: WeightLayout, *, every: bool = False) -> str:
    """Format the table with totals and suggested rules, and the points to check."""
    points = "".join(f"\n- {point}" for point in points_to_check(model, layout))
    return layout.table(every=every) + (f"\n\nTo check:{points}" if points else "")


def as_json(model: nn.Module, layout: WeightLayout) -> dict[str, Any]:
    """Return the same as a dictionary for programs: ``parameters``, ``totals`` and ``to_check``."""
    return {
        "parameters": [_as_dict(entry) for entry in layout.entries],
        "totals": {
            "parameters": len(layout.entries),
            "centered": len(layout),
            "elements": sum(entry.parameter.numel() for entry in layout.entries if not is_lazy(entry.parameter)),
            "centered_elements": sum(parameter.numel() for parameter in layout),
            "unknown": len(layout.unknown),
        },
        "to_check": points_to_check(model, layout),
    }


def points_to_check(model: nn.Module, layout: WeightLayout) -> list[str]:
    """Return decisions that the user may not expect, one line each, with code that changes them."""
    modules = {site.tensor: site.owner.module for site in sites(model)}
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in layout.entries:
        for point in _points(entry, modules.get(entry.parameter)):
            groups.setdefault(point, []).append(entry.name)
    lines = []
    for (text, effect), names in groups.items():
        options = {"skips": f"exclude={names}", "centers": f"overrides={dict.fromkeys(names, 'o [i...]')}"}
        remedy = f"; weight_layout(model, {options[effect]}) {effect} it" if effect else ""
        lines.append(f"{', '.join(compact_names(names))}: {text}{remedy}")
    return lines


def _points(entry: Entry, module: nn.Module | None) -> Iterator[tuple[str, str]]:
    """Yield each point to check and the effect of its remedy: "skips", "centers", or none."""
    if entry.vectors is None:
        if entry.unknown or entry.reason.startswith(("tied:", "fan-in ", "pruned", "lazy")):
            effect = "centers" if entry.reason.startswith("tied:") else ""
            yield f"skipped{' as unknown' * entry.unknown} ({entry.reason})", effect
        return
    if entry.vectors.fan_in <= _SMALL_FAN_IN:
        yield f"centered with fan-in {entry.vectors.fan_in}, which leaves few directions", "skips"
    if entry.origin != "override" and module is not None and has_uneven_phases(module, entry.parameter):
        yield "centered over the taps of several phases, since the kernel is not a multiple of the stride", "skips"


def _as_dict(entry: Entry) -> dict[str, Any]:
    sizes = shape_of(entry.parameter)
    numbers = ("count", "fan_in", "pattern", "span", "view")
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "shape": None if sizes is None else list(sizes),
        "trained": entry.parameter.requires_grad,
        "weight_vectors": entry.vectors and {name: getattr(entry.vectors, name) for name in numbers},
        "rule": entry.origin or None,
        "reason": entry.reason or None,
        "unknown": entry.unknown,
        "suggestion": entry.suggestion or None,
    }
