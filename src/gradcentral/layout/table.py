"""A layout as a table of text, with one row where layers repeat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch.nn.parameter import is_lazy

from gradcentral.layout.entry import Entry

__all__ = ["aligned", "compact_names", "render"]

_HEADER = ("parameter", "shape", "weight vectors", "decided by")
_RULE = 120


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
    return aligned([_HEADER, *((_name(row), *row.cells) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns, the first row being the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    text = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1])) for line in lines
    ]
    rule = "-" * min(max(map(len, text)), _RULE)
    return "\n".join([text[0], rule, *text[1:]])


def compact_names(names: Iterable[str]) -> list[str]:
    """The names, those of layers that are alike written as one.

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
    """Write layers that are alike in all their rows as one: the innermost numbers first."""
    for position in reversed(range(max((len(row.pieces) for row in rows), default=0))):
        rows = _merged_at(rows, position)
    return rows


def _merged_at(rows: list[_Row], position: int) -> list[_Row]:
    layers: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        if _is_numbered(row, position):
            layers.setdefault(row.pieces[: position + 1], []).append(row)
    alike: dict[object, list[tuple[str, ...]]] = {}
    for layer, members in layers.items():
        content = tuple((row.pieces[position + 1 :], row.repeats, row.cells) for row in members)
        alike.setdefault((layer[:-1], content), []).append(layer)
    groups = {group[0]: group for group in alike.values()}
    merged = []
    for row in rows:
        if not _is_numbered(row, position):
            merged.append(row)
        elif (group := groups.get(row.pieces[: position + 1])) is not None:
            label = _label([layer[-1] for layer in group])
            pieces = (*row.pieces[:position], label, *row.pieces[position + 1 :])
            merged.append(_Row(pieces, row.repeats * len(group), row.cells))
    return merged


def _is_numbered(row: _Row, position: int) -> bool:
    return position < len(row.pieces) and row.pieces[position].isdigit()


def _label(digits: list[str]) -> str:
    if len(digits) == 1:
        return digits[0]
    numbers = sorted(map(int, digits))
    consecutive = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
