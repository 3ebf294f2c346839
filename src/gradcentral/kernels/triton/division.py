"""How the work of one launch is divided: pure Python and torch, no Triton.

An *item* is one parameter. It is cut into *pieces*, one for each program of the launch: some weight vectors, walked
over twice while they are in the cache, or, where single vectors are long, a part of some, whose sums other programs
wait for. The arithmetic that leads from a piece's index to its memory is the kernel's; a piece is two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.loops import Loop

__all__ = ["FIELDS", "LONGEST", "TILE", "LaunchTables", "TileShape", "divide"]

TILE = 1024
"""Elements that a program has in its registers at a time: 16 bytes of f32 for each of 256 threads."""
PIECE = 8 * TILE
"""Elements of a piece of short weight vectors, where there is work enough for the whole device."""
SMALL = 1 << 21
"""Below that many elements in all, pieces are one tile."""
LONGEST = 1 << 16
"""Bytes of gradient that a program reads twice; a longer weight vector, or set of columns, is cut into parts."""
SET = 1 << 21
"""Elements of cut vectors that are summed before they are stepped; their gradients must stay in the device's cache."""
ALIGNMENT = 16
"""Elements: offsets divisible by that many let a thread read 16 bytes at a time."""

REACH = 1 << 31
"""Elements: offsets inside a piece are 32-bit numbers."""

SUM, STEP = 1, 2


class TileShape(IntEnum):
    """The tile that serves an item: how many weight vectors and how many of their elements at a time."""

    PLAIN = 0
    PLAIN_ALIGNED = 1
    LONG = 2
    LONG_ALIGNED = 3
    MIDDLE_ALIGNED = 4
    SHORT = 5
    ACROSS = 6
    ACROSS_ALIGNED = 7


class TiledParameter(NamedTuple):
    """An item as the kernel reads it: int64 numbers.

    A weight vector's element k lies ``k // b * jump + k % b`` behind its first, and vectors of a group lie ``stride``
    apart, groups ``group_stride``. ``vectors`` of them make a piece (``blocks`` in a group), of which ``parts`` of
    ``rows`` runs each are programs of their own. Of its weight vectors, ``members`` in all, the sums of parts begin at
    ``slot``, the counters of finished parts at ``counter``, and the means at ``first_mean``.
    """

    shape: int
    units: int
    vectors: int
    blocks: int
    parts: int
    rows: int
    outer: int
    inner: int
    jump: int
    stride: int
    group_stride: int
    slot: int
    counter: int
    first_mean: int
    members: int


FIELDS = len(TiledParameter._fields)


class LaunchTables(NamedTuple):
    """Tables for the kernel."""

    items: Tensor
    """int64 ``[items, FIELDS]``"""
    pieces: Tensor
    """int32 ``[pieces, 2]``: the item times 4 plus what to do (SUM, STEP or both), and the index among the item's."""
    slots: int
    """Numbers that hold sums of parts of weight vectors."""
    counters: int
    """How many sets of parts are waited for."""
    means: int
    """How many weight vectors there are."""


def divide(loops: Sequence[tuple[Loop, int]], itemsize: int) -> LaunchTables:
    """Divide the work on items with these loops and placements (0: not centered) of ``itemsize`` bytes an element.

    What is cut comes first: the sums of one set of vectors, then, again and again, the sums of the next set and the
    steps of the last. So no program waits for one that comes after it, and a set's gradients are still in the cache.
    """
    total = sum(math.prod(loop) for loop, _ in loops)
    items: list[TiledParameter] = []
    slots = counters = means = 0
    for loop, placement in loops:
        item = _item(loop, placement, itemsize, TILE if total < SMALL else PIECE)
        groups = _groups(loop, item)
        item = item._replace(slot=slots, counter=counters, first_mean=means, members=groups * item.units)
        if placement:
            means += item.members
        if item.parts > 1:
            slots += item.parts * item.members
            counters += groups * item.blocks
        items.append(item)
    pieces = [*_cut(items, loops), *_whole(items, loops)]
    table = torch.tensor([tuple(item) for item in items], dtype=torch.int64).reshape(len(items), FIELDS)
    listed = torch.cat(pieces) if pieces else torch.zeros(0, 2, dtype=torch.int32)
    return LaunchTables(table, listed, slots, counters, means)


def _item(loop: Loop, placement: int, itemsize: int, piece: int) -> TiledParameter:
    groups, outer, units, inner = loop
    if placement == 0:
        n = math.prod(loop)
        shape = TileShape.PLAIN_ALIGNED if n % ALIGNMENT == 0 else TileShape.PLAIN
        return TiledParameter(shape, n, piece, _up(n, piece), 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
    rows = units * inner == 1
    n, jump, stride = (groups, 1, outer) if rows else (units, units * inner, inner)
    shape, vectors = _tile(loop, itemsize, piece)
    many = vectors if shape in (TileShape.ACROSS, TileShape.ACROSS_ALIGNED) else 1
    longest = min(LONGEST // (itemsize * many * inner), (REACH - 1) // jump)
    per_part = outer
    if outer > longest:
        per_part = _up(outer, _up(outer, max(1, longest)))
        if rows:  # each part begins aligned
            per_part = _up(per_part, ALIGNMENT) * ALIGNMENT
        vectors = many
    parts = _up(outer, per_part) if outer else 1
    group_stride = 0 if rows else outer * units * inner
    blocks = _up(n, vectors)
    return TiledParameter(
        shape, n, vectors, blocks, parts, per_part, outer, inner, jump, stride, group_stride, 0, 0, 0, 0
    )


def _tile(loop: Loop, itemsize: int, piece: int) -> tuple[TileShape, int]:
    """An item's shape, and how many weight vectors make a piece."""
    fan_in, width = loop.outer * loop.inner, loop.units * loop.inner
    each = max(1, piece // max(fan_in, 1))
    if width == 1:
        aligned = fan_in % ALIGNMENT == 0
        if aligned and fan_in >= TILE // 2:
            return TileShape.LONG_ALIGNED, each
        if aligned and fan_in > 64:
            return TileShape.MIDDLE_ALIGNED, _multiple(each, 16)
    elif loop.inner == 1 and fan_in > 32:
        beside = columns_beside(itemsize)
        return (TileShape.ACROSS_ALIGNED if width % ALIGNMENT == 0 else TileShape.ACROSS), beside
    if fan_in >= TILE // 8:
        return TileShape.LONG, each
    return TileShape.SHORT, _multiple(each, TILE // 16)


def columns_beside(itemsize: int) -> int:
    """How many columns a program takes: 64 bytes of each row."""
    return max(16, 64 // itemsize)


def _up(n: int, by: int) -> int:
    return -(-n // by)


def _multiple(n: int, of: int) -> int:
    return max(1, n // of) * of


def _groups(loop: Loop, item: TiledParameter) -> int:
    return loop.groups if item.group_stride else 1


def _n_pieces(loop: Loop, item: TiledParameter) -> int:
    return _groups(loop, item) * item.blocks * item.parts if math.prod(loop) else 0


def _pieces(position: int, what: int, begin: int, end: int) -> Tensor:
    index = torch.arange(begin, end, dtype=torch.int32)
    return torch.stack([torch.full_like(index, position * 4 + what), index], 1)


def _whole(items: Sequence[TiledParameter], loops: Sequence[tuple[Loop, int]]) -> Iterator[Tensor]:
    for position, (item, (loop, placement)) in enumerate(zip(items, loops, strict=True)):
        if item.parts == 1:
            yield _pieces(position, SUM | STEP if placement else STEP, 0, _n_pieces(loop, item))


def _cut(items: Sequence[TiledParameter], loops: Sequence[tuple[Loop, int]]) -> Iterator[Tensor]:
    """Sums and steps of the items in parts, in sets that follow one another."""
    last: list[tuple[int, int, int]] = []
    current: list[tuple[int, int, int]] = []
    elements = 0
    for position, (item, (loop, _)) in enumerate(zip(items, loops, strict=True)):
        if item.parts == 1:
            continue
        each = item.vectors * item.outer * item.inner  # of all parts of a block
        blocks = _groups(loop, item) * item.blocks
        at_a_time = max(1, SET // each)
        for begin in range(0, blocks, at_a_time):
            end = min(blocks, begin + at_a_time)
            current.append((position, begin * item.parts, end * item.parts))
            elements += (end - begin) * each
            if elements >= SET:
                yield from _set(current, last)
                last, current, elements = current, [], 0
    yield from _set(current, last)
    yield from _set([], current)


def _set(to_sum: list[tuple[int, int, int]], to_step: list[tuple[int, int, int]]) -> Iterator[Tensor]:
    for position, begin, end in to_sum:
        yield _pieces(position, SUM, begin, end)
    for position, begin, end in to_step:
        yield _pieces(position, STEP, begin, end)
