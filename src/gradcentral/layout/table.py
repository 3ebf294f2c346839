"""A layout as a table of text, with one row for layers that repeat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gradcentral.layout.rules import Entry, shape_of

__all__ = ["aligned", "compact_names", "render"]


class _Row(NamedTuple):
    """One or more parameters with the same cells."""

    pieces: tuple[str, ...]  # the name, split at the dots
    cells: tuple[str, ...]
    repeats: int = 1

    def __str__(self) -> str:
        return ".".join(self.pieces) + (f" ×{self.repeats}" if self.repeats > 1 else "")


def render(entries: Sequence[Entry], *, every: bool = False) -> str:
    """Format the table: parameter, shape, weight vectors (count × fan-in and pattern), and the rule or the reason."""
    rows = [_Row(tuple(" = ".join((entry.name, *entry.aliases)).split(".")), _cells(entry)) for entry in entries]
    header = ("parameter", "shape", "weight vectors", "decided by")
    return aligned([header, *((str(row), *row.cells) for row in (rows if every else _merged(rows)))])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as text in columns; the first row is the header."""
    *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    text = ["  ".join((*map(str.ljust, line, widths), line[-1])) for line in lines]
    return "\n".join([text[0], "-" * min(max(map(len, text)), 120), *text[1:]])


def compact_names(names: Iterable[str]) -> list[str]:
    """Combine the names of repeated layers, as in ``h.{0..2}.attn.bias ×3``."""
    return list(map(str, _merged([_Row(tuple(name.split(".")), ()) for name in names])))


def _cells(entry: Entry) -> tuple[str, ...]:
    sizes = shape_of(entry.parameter)
    shape = "?" if sizes is None else "×".join(map(str, sizes))
    frozen = "" if entry.parameter.requires_grad else "; not trained"
    if (vectors := entry.vectors) is None:
        return shape, "–", f"{entry.reason}{frozen}"
    return shape, f"{vectors.count} × {vectors.fan_in}  {vectors.pattern}", f"{entry.origin}{frozen}"


def _merged(rows: list[_Row]) -> list[_Row]:
    """Combine layers whose rows are all the same, starting from the innermost numbers."""
    for position in reversed(range(max((len(row.pieces) for row in rows), default=0))):
        rows = _merged_at(rows, position)
    return rows


def _merged_at(rows: list[_Row], position: int) -> list[_Row]:
    contents: dict[tuple[str, ...], list[_Row]] = {}  # rows of each numbered layer, without its name
    for row in rows:
        if position < len(row.pieces) and row.pieces[position].isdecimal():
            content = contents.setdefault(row.pieces[: position + 1], [])
            content.append(row._replace(pieces=row.pieces[position + 1 :]))
    groups: dict[object, list[int]] = {}  # the numbers of layers with the same content
    alike = {layer: groups.setdefault((layer[:-1], tuple(content)), []) for layer, content in contents.items()}
    for layer, numbers in alike.items():
        numbers.append(int(layer[-1]))
    merged = []
    for row in rows:
        layer = row.pieces[: position + 1]
        if len(numbers := alike.get(layer, [])) > 1:
            pieces = (*layer[:-1], _label(sorted(numbers)), *row.pieces[position + 1 :])
            row = _Row(pieces, row.cells, row.repeats * len(numbers))
        merged.append(row)
    return list(dict.fromkeys(merged))


def _label(numbers: list[int]) -> str:
    first, *_, last = numbers
    consecutive = len(numbers) > 2 and last - first == len(numbers) - 1
    return f"{{{first}..{last}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
