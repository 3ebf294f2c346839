"""A layout as a table of text, with one row for layers that repeat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gradcentral.layout.rules import Entry, shape_of
from gradcentral.text_table import Row, aligned, merged

__all__ = ["compact_names", "render"]


def render(entries: Sequence[Entry], *, every: bool = False) -> str:
    """Format the table: parameter, shape, weight vectors (count × fan-in and pattern), and the rule or the reason."""
    rows = [Row(_pieces(" = ".join((entry.name, *entry.aliases))), _cells(entry)) for entry in entries]
    header = ("parameter", "shape", "weight vectors", "decided by")
    return aligned([header, *((str(row), *row.cells) for row in (rows if every else merged(rows)))])


def compact_names(names: Iterable[str]) -> list[str]:
    """Combine the names of repeated layers, as in ``h.{0..2}.attn.bias ×3``."""
    return list(map(str, merged([Row(_pieces(name), ()) for name in names])))


def _pieces(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"(\.)", name))


def _cells(entry: Entry) -> tuple[str, ...]:
    sizes = shape_of(entry.parameter)
    shape = "?" if sizes is None else "×".join(map(str, sizes))
    frozen = "" if entry.parameter.requires_grad else "; not trained"
    if (vectors := entry.vectors) is None:
        return shape, "–", f"{entry.reason}{frozen}"
    return shape, f"{vectors.count} × {vectors.fan_in}  {vectors.pattern}", f"{entry.origin}{frozen}"
