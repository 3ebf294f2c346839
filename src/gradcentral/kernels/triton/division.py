"""Division of the work of one launch among the programs of the kernel. It imports no Triton.

Each parameter is cut into *pieces*, one per program. A piece is a few weight vectors, which a program reads twice while
they are in the cache: once for the mean, once for the update. Weight vectors too long for that are cut into *parts*,
which are summed by one set of programs and updated by another, which waits for the sums of all parts:

    tables of a launch:   sums of set 0 | sums of set 1, steps of set 0 | … | steps of the last set | whole pieces

    a block of 2 columns       ┌──┐
    in 3 parts:        part 0  │░░│  sums ┐ ┌ means  update
                       part 1  │░░│  sums ┼─┼ means  update
                       part 2  │░░│  sums ┘ └ means  update
                               └──┘

A piece is two numbers, its parameter and its index in it; the kernel computes the memory it covers (see step.py).

A parameter with ``units * inner > 1`` is a matrix of columns. In a transposed convolution, the adjacent ``inner``
columns of a unit, its *taps*, belong to one weight vector, or to one per phase: a block holds whole units, and the
kernel adds the sums of the columns of one weight vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.forms import Placement
from gradcentral.kernels.loops import Loop

__all__ = ["FIELDS", "LONGEST", "TILE", "LaunchTables", "TileShape", "divide"]

TILE = 1024
"""Elements that a program holds in registers at a time: 16 bytes of f32 for each of 256 threads."""
PIECE = 4 * TILE
"""Elements of a piece of short weight vectors, if there is enough work for the whole device."""
SMALL = 1 << 23
"""Below this total number of elements, pieces of short weight vectors are one tile, and parts of long ones shorter."""
SEGMENT = 256
"""Bytes that a program reads side by side; with 64, columns took 1.6 times as long on an H200."""
LONG = 1 << 9
"""Elements of a row from which a program takes one row at a time."""
LONGEST = 1 << 17
"""Bytes of gradient that a program reads twice; a longer weight vector, or set of columns, is cut into parts."""
SET = 1 << 21
"""Elements of cut vectors that are summed before they are updated; their gradients must stay in the device's cache."""
ALIGNMENT = 16
"""Elements. Offsets divisible by it let a thread read 16 bytes at a time."""
REACH = 1 << 31
"""Elements. Offsets inside a piece are 32-bit numbers."""

SUM, STEP = 1, 2


class TileShape(IntEnum):
    """Shape of a parameter's tile: how many weight vectors, and elements of each, are processed at a time."""

    PLAIN = 0
    PLAIN_ALIGNED = 1
    LONG = 2
    LONG_ALIGNED = 3
    MIDDLE_ALIGNED = 4
    SHORT = 5
    ACROSS = 6
    ACROSS_ALIGNED = 7


class TiledParameter(NamedTuple):
    """A parameter as the kernel reads it: a row of int64 numbers in this order.

    It consists of *lines*, its rows or columns, of ``outer`` elements at distance ``jump``. The distance between the
    first elements of the lines of a group is ``stride``, and between groups ``group_stride``. A group has ``units``
    lines in ``blocks`` of ``vectors``; a block has ``parts`` of ``rows`` elements of each line, and each part of a
    block is a piece. A weight vector is a line, or several of ``taps`` adjacent columns.
    """

    shape: int
    units: int
    vectors: int
    blocks: int
    parts: int = 1
    rows: int = 1
    outer: int = 1
    jump: int = 1
    stride: int = 1
    group_stride: int = 0
    slot: int = 0
    """Start of the sums of its parts."""
    counter: int = 0
    """Start of its counters of finished parts, one per block."""
    first_mean: int = 0
    """Start of its means."""
    members: int = 0
    """Number of its lines."""
    taps: int = 1
    """Number of adjacent columns that form one or more weight vectors."""
    phases: int = 1
    """Number of weight vectors that they form."""
    first_tap: int = 0
    """Start of its part of ``taps`` in `LaunchTables`."""

    @property
    def all_blocks(self) -> int:
        """The number of blocks of all groups; 0 if the parameter has no elements."""
        return self.members // self.units * self.blocks if self.members * self.outer else 0


FIELDS = len(TiledParameter._fields)


class LaunchTables(NamedTuple):
    """The division of a launch as the kernel reads it."""

    parameters: Tensor
    """int64 ``[parameters, FIELDS]``"""
    pieces: Tensor
    """int32 ``[pieces, 2]``: the parameter times 4 plus the action (SUM, STEP or both), and the piece's index in it."""
    slots: int
    """Total number of sums of parts."""
    counters: int
    """Total number of blocks in parts."""
    taps: Tensor
    """int32 ``[taps, 2]``: for each tap of a unit, the first tap of its weight vector, and its phase."""


def divide(loops: Sequence[tuple[Loop, Placement]], itemsize: int) -> LaunchTables:
    """Divide the work on parameters with these loops and placements.

    Pieces in parts come first: the sums of one set of blocks, then, alternating, the sums of the next set and the steps
    of the previous one. No piece then waits for a later one, and a set's gradients are still in the cache.

    Args:
        loops: the loop and the placement of each parameter.
        itemsize: bytes per element of the gradients.
    """
    total = sum(math.prod(loop) for loop, _ in loops)
    parameters: list[TiledParameter] = []
    slots = counters = means = 0
    taps: list[tuple[int, int]] = []
    for loop, placement in loops:
        piece, longest = (TILE, LONGEST // 8) if total < SMALL else (PIECE, LONGEST)
        tiled = _tile(loop, placement, itemsize, piece, longest)
        tiled = tiled._replace(slot=slots, counter=counters, first_mean=means, first_tap=len(taps))
        if placement:
            means += tiled.members // tiled.taps * tiled.phases
            taps += _taps(loop) if loop.inner > 1 else []
        if tiled.parts > 1:
            slots += tiled.parts * tiled.members
            counters += tiled.all_blocks
        parameters.append(tiled)
    whole = [
        _pieces(position, SUM | STEP if placement else STEP, 0, tiled.all_blocks)
        for position, (tiled, (_, placement)) in enumerate(zip(parameters, loops, strict=True))
        if tiled.parts == 1
    ]
    rows = torch.tensor(parameters, dtype=torch.int64, device="cpu").reshape(len(parameters), FIELDS)
    pieces = torch.cat([torch.zeros(0, 2, dtype=torch.int32, device="cpu"), *_pieces_in_parts(parameters), *whole])
    return LaunchTables(rows, pieces, slots, counters, torch.tensor(taps or [(0, 0)], dtype=torch.int32, device="cpu"))


def _taps(loop: Loop) -> list[tuple[int, int]]:
    """Return, for each tap of a unit, the first tap of its weight vector, and the number of its phase."""
    firsts = loop.first_of_phase()
    phases = {first: phase for phase, first in enumerate(dict.fromkeys(firsts))}
    return [(first, phases[first]) for first in firsts]


def _tile(loop: Loop, placement: Placement, itemsize: int, piece: int, longest: int) -> TiledParameter:
    """Choose a parameter's tile, and cut it into blocks and parts."""
    groups, outer, units, inner = loop
    if placement == Placement.PLAIN:
        n = math.prod(loop)
        shape = TileShape.PLAIN if n % ALIGNMENT else TileShape.PLAIN_ALIGNED
        return TiledParameter(shape, n, piece, blocks=_up(n, piece), members=n)
    width = units * inner
    rows = width == 1
    shape, vectors = _rows_shape(outer, itemsize, piece) if rows else _columns_shape(width, inner, itemsize)
    per_group, jump, stride = (groups, 1, outer) if rows else (width, width, 1)
    beside = 1 if rows else elements_beside(itemsize)
    most = max(1, min(longest // (itemsize * beside), (REACH - 1) // jump))
    per_part = outer
    if outer > most:
        per_part = _up(outer, _up(outer, most))
        if rows:  # align the start of each part
            per_part = _up(per_part, ALIGNMENT) * ALIGNMENT
            vectors = 1
    return TiledParameter(
        shape,
        per_group,
        vectors,
        blocks=_up(per_group, vectors),
        parts=_up(outer, per_part) if outer else 1,
        rows=per_part,
        outer=outer,
        jump=jump,
        stride=stride,
        group_stride=0 if rows else outer * width,
        members=groups * width,
        taps=inner,
        phases=loop.phases,
    )


def _rows_shape(fan_in: int, itemsize: int, piece: int) -> tuple[TileShape, int]:
    """Return the tile shape of rows, and the number of rows per piece."""
    each = max(1, piece // max(fan_in, 1))
    aligned = fan_in % ALIGNMENT == 0
    if aligned and fan_in >= LONG:
        return TileShape.LONG_ALIGNED, each
    if aligned and fan_in > 16:
        return TileShape.MIDDLE_ALIGNED, _multiple(each, TILE // elements_beside(itemsize))
    if fan_in >= TILE // 8:
        return TileShape.LONG, each
    return TileShape.SHORT, _multiple(each, TILE // 16)


def _columns_shape(width: int, taps: int, itemsize: int) -> tuple[TileShape, int]:
    """Return the tile shape of columns, and the number of columns per piece: as many whole units as fit."""
    columns = elements_beside(itemsize) // taps * taps
    aligned = width % ALIGNMENT == 0 and columns % ALIGNMENT == 0
    return TileShape.ACROSS_ALIGNED if aligned else TileShape.ACROSS, columns


def elements_beside(itemsize: int) -> int:
    """Return the number of adjacent elements that a program reads from each of several rows."""
    return SEGMENT // itemsize


def _up(n: int, by: int) -> int:
    return -(-n // by)


def _multiple(n: int, of: int) -> int:
    return max(1, n // of) * of


def _pieces(position: int, what: int, begin: int, end: int) -> Tensor:
    index = torch.arange(begin, end, dtype=torch.int32, device="cpu")
    return torch.stack([torch.full_like(index, position * 4 + what), index], 1)


def _pieces_in_parts(parameters: Sequence[TiledParameter]) -> Iterator[Tensor]:
    """Yield the pieces of parameters in parts, set by set: sums of one set, then steps of the previous set."""
    last: list[tuple[int, int, int]] = []
    current: list[tuple[int, int, int]] = []
    elements = 0
    for position, tiled in enumerate(parameters):
        if tiled.parts == 1:
            continue
        each = tiled.vectors * tiled.outer  # elements of a block
        at_a_time = max(1, SET // each)
        for begin in range(0, tiled.all_blocks, at_a_time):
            end = min(tiled.all_blocks, begin + at_a_time)
            current.append((position, begin * tiled.parts, end * tiled.parts))
            elements += (end - begin) * each
            if elements >= SET:
                yield from _sums_and_steps(current, last)
                last, current, elements = current, [], 0
    yield from _sums_and_steps(current, last)
    yield from _sums_and_steps([], current)


def _sums_and_steps(to_sum: list[tuple[int, int, int]], to_step: list[tuple[int, int, int]]) -> Iterator[Tensor]:
    for what, ranges in ((SUM, to_sum), (STEP, to_step)):
        for position, begin, end in ranges:
            yield _pieces(position, what, begin, end)
