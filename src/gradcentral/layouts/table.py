"""A layout as a table of text, with one row for parameters that differ only in the number of their layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch.nn.parameter import is_lazy

from gradcentral.layouts.entry import Entry

__all__ = ["compact_names", "render"]

_HEADER = ("parameter", "shape", "weight vectors", "decided by")


class _Row(NamedTuple):
    pieces: tuple[str, ...]
    """The name between its dots."""
    repeats: int
    cells: tuple[str, str, str]


def render(entries: Sequence[Entry], *, every: bool = False) -> str:
    """The table: parameter, shape, weight vectors (count × fan-in and the axes), and the rule or the reason."""
    rows = [_Row(_pieces(entry), 1, _cells(entry)) for entry in entries]
    if not every:
        rows = _merged(rows)
    lines = [_HEADER, *((_name(row), *row.cells) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3])) for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def compact_names(names: Iterable[str]) -> list[str]:
    """The names, those that differ only in the number of a layer written as one.

    Examples:
        >>> compact_names(["h.0.attn.bias", "h.1.attn.bias", "h.2.attn.bias", "ln.bias"])
        ['h.{0..2}.attn.bias ×3', 'ln.bias']
    """
    return [_name(row) for row in _merged([_Row(tuple(name.split(".")), 1, ("", "", "")) for name in names])]


def _pieces(entry: Entry) -> tuple[str, ...]:
    return tuple(" = ".join((entry.name, *entry.aliases)).split("."))


def _name(row: _Row) -> str:
    name = ".".join(row.pieces)
    return f"{name} ×{row.repeats}" if row.repeats > 1 else name


def _cells(entry: Entry) -> tuple[str, str, str]:
    shape = "?" if is_lazy(entry.parameter) else "×".join(map(str, entry.parameter.shape))
    frozen = "" if entry.parameter.requires_grad else "; does not train"
    if entry.vectors is None:
        return shape, "–", f"{entry.reason}{frozen}"
    vectors = entry.vectors
    of_view = f" of {'×'.join(map(str, vectors.view))}" if vectors.view else ""
    axes = ", ".join(map(str, vectors.span))
    return shape, f"{vectors.count} × {vectors.fan_in} over {axes}{of_view}", f"{entry.origin}{frozen}"


def _merged(rows: list[_Row]) -> list[_Row]:
    """Merge rows that are alike but for one number in their names: the last number first, then the one before."""
    for position in reversed(range(max((len(row.pieces) for row in rows), default=0))):
        groups: dict[object, list[_Row]] = {}
        for row in rows:
            if position < len(row.pieces) and row.pieces[position].isdigit():
                others = (row.pieces[:position], row.pieces[position + 1 :])
                key: object = (others, row.repeats, row.cells)
            else:
                key = id(row)
            groups.setdefault(key, []).append(row)
        rows = [_merge(group, position) for group in groups.values()]
    return rows


def _merge(group: list[_Row], position: int) -> _Row:
    first = group[0]
    if len(group) == 1:
        return first
    numbers = sorted(int(row.pieces[position]) for row in group)
    consecutive = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    span = f"{numbers[0]}..{numbers[-1]}" if consecutive else ",".join(map(str, numbers))
    pieces = (*first.pieces[:position], f"{{{span}}}", *first.pieces[position + 1 :])
    return _Row(pieces, first.repeats * len(group), first.cells)
