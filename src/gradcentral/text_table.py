"""Tables of text, with one row for layers that repeat. Pure Python: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Row", "aligned", "merged"]


class Row(NamedTuple):
    """One or more parameters with the same cells."""

    pieces: tuple[str, ...]  # the name, cut before and after each number of a layer
    cells: tuple[str, ...]
    repeats: int = 1

    def __str__(self) -> str:
        return "".join(self.pieces) + (f" ×{self.repeats}" if self.repeats > 1 else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as text in columns; the first row is the header."""
    *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    text = ["  ".join((*map(str.ljust, line, widths), line[-1])) for line in lines]
    return "\n".join([text[0], "-" * min(max(map(len, text)), 120), *text[1:]])


def merged(rows: Iterable[Row]) -> list[Row]:
    """Combine layers whose rows are all the same, starting from the innermost numbers."""
    rows = list(rows)
    for position in reversed(range(max((len(row.pieces) for row in rows), default=0))):
        rows = _merged_at(rows, position)
    return rows


def _merged_at(rows: list[Row], position: int) -> list[Row]:
    contents: dict[tuple[str, ...], list[Row]] = {}  # rows of each numbered layer, without its name
    for row in rows:
        if position < len(row.pieces) and row.pieces[position].isdecimal():
            content = contents.setdefault(row.pieces[: position + 1], [])
            content.append(row._replace(pieces=row.pieces[position + 1 :]))
    groups: dict[object, list[int]] = {}  # the numbers of layers with the same content
    alike = {layer: groups.setdefault((layer[:-1], tuple(content)), []) for layer, content in contents.items()}
    for layer, numbers in alike.items():
        numbers.append(int(layer[-1]))
    combined = []
    for row in rows:
        layer = row.pieces[: position + 1]
        if len(numbers := alike.get(layer, [])) > 1:
            pieces = (*layer[:-1], _label(sorted(numbers)), *row.pieces[position + 1 :])
            row = Row(pieces, row.cells, row.repeats * len(numbers))
        combined.append(row)
    return list(dict.fromkeys(combined))


def _label(numbers: list[int]) -> str:
    first, *_, last = numbers
    consecutive = len(numbers) > 2 and last - first == len(numbers) - 1
    return f"{{{first}..{last}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
