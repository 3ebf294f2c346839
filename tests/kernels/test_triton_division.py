"""The division of the Triton kernel's work: every element once, and sums before the updates that wait for them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gradcentral.bench.shapes import MODELS
from gradcentral.kernels.forms import Placement
from gradcentral.kernels.loops import Loop, loop_of_vectors
from gradcentral.kernels.triton import division
from gradcentral.kernels.triton.division import FIELDS, REACH, STEP, SUM, TiledParameter, TileShape, divide

PLAIN, GRADIENT, UPDATE, _ = Placement
LOOPS = st.tuples(
    st.builds(Loop, *[st.integers(1, size) for size in (5, 3000, 200, 30)]).map(
        lambda loop: loop if loop.units * loop.inner > 1 else Loop(loop.groups, loop.outer, 1, 1)
    ),
    st.sampled_from(Placement),
)


def rows_of(table: torch.Tensor) -> list[TiledParameter]:
    assert table.shape[1:] == (FIELDS,)
    return [TiledParameter(*row) for row in table.tolist()]


def elements(row: TiledParameter, index: int) -> int:
    """Return the number of elements of a piece, computed as in the kernel."""
    part, block = index % row.parts, index // row.parts
    units = min(row.vectors, row.units - block % row.blocks * row.vectors)
    return units * min(row.rows, row.outer - part * row.rows)


@given(loops=st.lists(LOOPS, max_size=5), itemsize=st.sampled_from([2, 4]))
@example(loops=[(Loop(1, 2**17, 2**14, 1), GRADIENT), (Loop(3, 50_000, 1, 1), UPDATE)], itemsize=4)
@example(loops=[(Loop(0, 3, 1, 1), GRADIENT), (Loop(5, 3, 1, 1), GRADIENT)], itemsize=2)
def test_pieces_cover_every_element_once(loops: list[tuple[Loop, Placement]], itemsize: int) -> None:
    tables = divide(loops, itemsize)
    rows = rows_of(tables.parameters)
    summed: Counter[int] = Counter()
    updated: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    for word, index in tables.pieces.tolist():
        position, what = divmod(word, 4)
        count = elements(rows[position], index)
        assert count > 0
        summed[position] += count if what & SUM else 0
        updated[position] += count if what & STEP else 0
        assert (word, index) not in seen
        seen.add((word, index))
    for position, (loop, placement) in enumerate(loops):
        assert updated[position] == math.prod(loop)
        assert summed[position] == (math.prod(loop) if placement else 0)


@given(loops=st.lists(LOOPS, max_size=4))
@example(
    loops=[(Loop(40, 700_001, 1, 1), GRADIENT), (Loop(1, 4000, 1100, 1), UPDATE), (Loop(6, 70_000, 1, 1), GRADIENT)]
)
def test_no_piece_waits_for_a_later_one(loops: list[tuple[Loop, Placement]]) -> None:
    tables = divide(loops, 4)
    rows = rows_of(tables.parameters)
    done: Counter[tuple[int, int]] = Counter()
    for word, index in tables.pieces.tolist():
        position, what = divmod(word, 4)
        row = rows[position]
        if row.parts == 1:
            continue
        block = (position, index // row.parts)
        if what == SUM:
            done[block] += 1
        else:
            assert what == STEP
            assert done[block] == row.parts


def test_slots_counters_and_means_do_not_overlap() -> None:
    loops = [
        (Loop(3, 50_000, 1, 1), GRADIENT),
        (Loop(2, 3000, 40, 1), UPDATE),
        (Loop(70, 9, 1, 1), GRADIENT),
        (Loop(5, 1, 1, 1), PLAIN),
    ]
    tables = divide(loops, 4)
    rows = rows_of(tables.parameters)
    parts = [row.parts for row in rows]
    assert parts[:2] > [1, 1]
    assert parts[2:] == [1, 1]
    assert rows[1].slot == rows[0].parts * rows[0].members
    assert tables.slots == rows[1].slot + rows[1].parts * rows[1].members
    assert rows[1].counter == 3
    assert tables.counters == 3 + 2 * rows[1].blocks
    assert [(row.first_mean, row.members) for row in rows[:3]] == [(0, 3), (3, 80), (83, 70)]


@pytest.mark.parametrize(
    ("loop", "placement", "shape"),
    [
        (Loop(1, 1, 7, 1), PLAIN, TileShape.PLAIN),
        (Loop(1, 1, 64, 1), PLAIN, TileShape.PLAIN_ALIGNED),
        (Loop(4096, 11008, 1, 1), GRADIENT, TileShape.LONG_ALIGNED),
        (Loop(7, 1001, 1, 1), GRADIENT, TileShape.LONG),
        (Loop(512, 384, 1, 1), GRADIENT, TileShape.MIDDLE_ALIGNED),
        (Loop(960, 9, 1, 1), GRADIENT, TileShape.SHORT),
        (Loop(1, 768, 2304, 1), GRADIENT, TileShape.ACROSS_ALIGNED),
        (Loop(1, 768, 2303, 1), GRADIENT, TileShape.ACROSS),
        (Loop(1, 512, 256, 16), GRADIENT, TileShape.ACROSS_ALIGNED),
        (Loop(1, 512, 256, 9), GRADIENT, TileShape.ACROSS),
        (Loop(1, 16, 48, 1), GRADIENT, TileShape.ACROSS_ALIGNED),
    ],
)
def test_tiles_fit_the_weight_vectors(loop: Loop, placement: Placement, shape: TileShape) -> None:
    assert rows_of(divide([(loop, placement)], 4).parameters)[0].shape == shape


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_pieces_of_the_benchmarked_models_have_similar_sizes(model: str, itemsize: int) -> None:
    """No program has much more work than others, and there are enough programs for a large device."""
    shapes = MODELS[model]()
    centered = [loop_of_vectors(vectors) or Loop(0, 0, 0, 0) for _, vectors in shapes if vectors is not None]
    plain = [Loop(math.prod(shape), 1, 1, 1) for shape, vectors in shapes if vectors is None]
    loops = [*((loop, GRADIENT) for loop in centered), *((loop, PLAIN) for loop in plain)]
    tables = divide(loops, itemsize)
    rows = rows_of(tables.parameters)
    total = sum(math.prod(loop) for loop, _ in loops)
    largest = max(elements(rows[word // 4], index) for word, index in tables.pieces.tolist())
    assert largest * itemsize <= 2**17
    assert len(tables.pieces) >= min(1000, total / 2**13)
    assert 4 * tables.slots <= max(2**20, 0.01 * itemsize * total), "sums of parts take too much memory"


def test_the_taps_of_a_unit_are_assigned_to_its_phases() -> None:
    loops = [(Loop(5, 3, 1, 1), GRADIENT), (Loop(2, 3, 5, 4, taps=(2, 2)), UPDATE), (Loop(1, 3, 4, 9), GRADIENT)]
    tables = divide(loops, 4)
    rows = rows_of(tables.parameters)
    assert tables.taps.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1], *[[0, 0]] * 9]
    assert [(row.taps, row.phases, row.first_tap) for row in rows] == [(1, 1, 0), (4, 2, 0), (9, 1, 4)]
    assert [row.first_mean for row in rows] == [0, 5, 25]
    assert [row.vectors % row.taps for row in rows] == [0, 0, 0]


@pytest.mark.parametrize("loop", [Loop(1, 8, 2**33, 1), Loop(1, 2**20, 2**20, 1), Loop(3, 2**35, 1, 1)])
def test_offsets_within_a_piece_are_32_bit_numbers(loop: Loop) -> None:
    row = division._tile(loop, GRADIENT, 4, division.PIECE, division.LONGEST)
    assert (row.rows - 1) * row.jump + (row.vectors - 1) * row.stride < REACH
    assert row.parts * row.rows >= loop.outer
