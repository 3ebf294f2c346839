"""A layout as a table of text, with one row for layers that repeat, and rules to paste for unknown parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from gradcentral.layout.rules import Entry
from gradcentral.layout.sites import Site

__all__ = ["aligned", "compact_names", "render", "suggestion"]

_HEADER = ("parameter", "shape", "weight vectors", "decided by")
_RULE = 120


class _Row(NamedTuple):
    """One or more parameters with the same cells."""

    pieces: tuple[str, ...]
    """The name, split at the dots."""
    repeats: int
    cells: tuple[str, ...]


def render(entries: Sequence[Entry], *, every: bool = False) -> str:
    """The table: parameter, shape, weight vectors (count × fan-in and pattern), and the rule or the reason."""
    rows = [_Row(tuple(" = ".join((entry.name, *entry.aliases)).split(".")), 1, _cells(entry)) for entry in entries]
    if not every:
        rows = _merged(rows)
    return aligned([_HEADER, *((_name(row), *row.cells) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    text = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1])) for line in lines
    ]
    rule = "-" * min(max(map(len, text)), _RULE)
    return "\n".join([text[0], rule, *text[1:]])


def compact_names(names: Iterable[str]) -> list[str]:
    """The names, with those of repeated layers combined.

    Examples:
        >>> compact_names(["h.0.attn.bias", "h.1.attn.bias", "h.2.attn.bias", "ln.bias"])
        ['h.{0..2}.attn.bias ×3', 'ln.bias']
    """
    return [_name(row) for row in _merged([_Row(tuple(name.split(".")), 1, ()) for name in names])]


def suggestion(site: Site) -> str:
    """A line of code that skips an unknown parameter, or centers it once edited; empty for fewer than two axes."""
    tensor = site.tensor
    if is_lazy(tensor) or tensor.ndim <= 1:
        return ""
    cls: type = type_before_parametrizations(site.owner.module)
    module, path = cls.__module__, cls.__qualname__
    importable = all(piece.isidentifier() for piece in f"{module}.{path}".split("."))
    if site.owner.skip is None and importable and not module.startswith("torch.nn."):
        line = f"gradcentral.register_layout({path}, {json.dumps(_name_for_all_items(site))}, None)"
        if module != "__main__":
            line = f"from {module} import {path.partition('.')[0]}; {line}"
    else:  # a rule for the class would be too broad, or would not be applied
        line = f"layout = gradcentral.weight_layout(model, overrides={{{json.dumps(site.name)}: None}})"
    if tensor.ndim == 2:
        choices = '"o [i]" if used as linear(x, w), "[i] o" if as x @ w'
    else:
        choices = f'or brackets around the axes that one output unit sums over, as in "o [i{" i" * (tensor.ndim - 2)}]"'
    return f"{line}  # {'×'.join(map(str, tensor.shape))}: None to skip it, {choices}"


def _name_for_all_items(site: Site) -> str:
    """The parameter's name for `register_layout`, with a wildcard for the items of a list."""
    first, *rest = site.owner.name.split(".")
    if not rest:
        return first
    last = "*" if isinstance(site.modules[-1], (nn.ParameterList, nn.ParameterDict)) else rest[-1]
    return ".".join((first, *"*" * (len(rest) - 1), last))


def _name(row: _Row) -> str:
    name = ".".join(row.pieces)
    return f"{name} ×{row.repeats}" if row.repeats > 1 else name


def _cells(entry: Entry) -> tuple[str, ...]:
    shape = "?" if is_lazy(entry.parameter) else "×".join(map(str, entry.parameter.shape))
    frozen = "" if entry.parameter.requires_grad else "; not trained"
    if entry.vectors is None:
        return shape, "–", f"{entry.reason}{frozen}"
    vectors = entry.vectors
    return shape, f"{vectors.count} × {vectors.fan_in}  {vectors.pattern}", f"{entry.origin}{frozen}"


def _merged(rows: list[_Row]) -> list[_Row]:
    """Combine layers whose rows are all the same, beginning with the innermost numbers."""
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
