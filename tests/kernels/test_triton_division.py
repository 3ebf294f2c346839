"""How the work of the Triton kernels is divided: every element once, sums before the steps that wait for them."""

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
from gradcentral.kernels.triton.division import FIELDS, REACH, STEP, SUM, TiledParameter, TileShape, divide

PLAIN, GRADIENT, UPDATE = Placement
LOOPS = st.tuples(
    st.builds(Loop, *[st.integers(1, size) for size in (5, 3000, 200, 30)]).map(
        lambda loop: loop if loop.units * loop.inner > 1 else Loop(loop.groups, loop.outer, 1, 1)
    ),
    st.sampled_from(Placement),
)


def rows_of(table: torch.Tensor) -> list[TiledParameter]:
    assert table.shape[1:] == (FIELDS,)
    return [TiledParameter(*row) for row in table.tolist()]


def elements(item: TiledParameter, index: int) -> int:
    """How many elements a piece has, by the arithmetic of the kernel."""
    part, block = index % item.parts, index // item.parts
    units = min(item.vectors, item.units - block % item.blocks * item.vectors)
    return units * min(item.rows, item.outer - part * item.rows) * item.inner


@given(loops=st.lists(LOOPS, max_size=5), itemsize=st.sampled_from([2, 4]))
@example(loops=[(Loop(1, 2**17, 2**14, 1), GRADIENT), (Loop(3, 50_000, 1, 1), UPDATE)], itemsize=4)
@example(loops=[(Loop(0, 3, 1, 1), GRADIENT), (Loop(5, 3, 1, 1), GRADIENT)], itemsize=2)
def test_pieces_cover_everything_once(loops: list[tuple[Loop, Placement]], itemsize: int) -> None:
    division = divide(loops, itemsize)
    summed: Counter[int] = Counter()
    stepped: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    items = rows_of(division.parameters)
    for word, index in division.pieces.tolist():
        position, what = divmod(word, 4)
        item = items[position]
        count = elements(item, index)
        assert count > 0
        summed[position] += count if what & SUM else 0
        stepped[position] += count if what & STEP else 0
        assert (word, index) not in seen
        seen.add((word, index))
    for position, (loop, placement) in enumerate(loops):
        assert stepped[position] == math.prod(loop)
        assert summed[position] == (math.prod(loop) if placement else 0)


@given(loops=st.lists(LOOPS, max_size=4))
@example(
    loops=[(Loop(40, 700_001, 1, 1), GRADIENT), (Loop(1, 4000, 1100, 1), UPDATE), (Loop(6, 70_000, 1, 1), GRADIENT)]
)
def test_no_piece_waits_for_one_that_comes_after_it(loops: list[tuple[Loop, Placement]]) -> None:
    division = divide(loops, 4)
    done: Counter[tuple[int, int]] = Counter()
    items = rows_of(division.parameters)
    for word, index in division.pieces.tolist():
        position, what = divmod(word, 4)
        item = items[position]
        if item.parts == 1:
            continue
        block = (position, index // item.parts)
        if what == SUM:
            done[block] += 1
        else:
            assert what == STEP
            assert done[block] == item.parts


def test_scratch_places_do_not_overlap() -> None:
    loops = [
        (Loop(3, 50_000, 1, 1), GRADIENT),
        (Loop(2, 3000, 40, 1), UPDATE),
        (Loop(70, 9, 1, 1), GRADIENT),
        (Loop(5, 1, 1, 1), PLAIN),
    ]
    division = divide(loops, 4)
    items = rows_of(division.parameters)
    parts = [item.parts for item in items]
    assert parts[:2] > [1, 1]
    assert parts[2:] == [1, 1]
    assert items[1].slot == items[0].parts * items[0].members
    assert division.slots == items[1].slot + items[1].parts * items[1].members
    assert items[1].counter == 3
    assert division.counters == 3 + 2 * items[1].blocks
    assert [item.first_mean for item in items[:3]] == [0, 3, 83]
    assert items[2].first_mean + items[2].members == 153


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
        (Loop(1, 512, 256, 16), GRADIENT, TileShape.LONG),
    ],
)
def test_tiles_fit_the_weight_vectors(loop: Loop, placement: Placement, shape: TileShape) -> None:
    assert rows_of(divide([(loop, placement)], 4).parameters)[0].shape == shape


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_pieces_of_the_measured_models_are_of_like_size(model: str, itemsize: int) -> None:
    """No program does much more than others, and there are enough of them for a large device."""
    loops = [
        (Loop(math.prod(shape), 1, 1, 1), 0)
        if vectors is None
        else (loop_of_vectors(vectors) or Loop(0, 0, 0, 0), GRADIENT)
        for shape, vectors in MODELS[model]()
    ]
    division = divide(loops, itemsize)
    items = rows_of(division.parameters)
    total = sum(math.prod(loop) for loop, _ in loops)
    largest = max(elements(items[word // 4], index) for word, index in division.pieces.tolist())
    assert largest * itemsize <= 2**17
    assert len(division.pieces) >= min(1000, total / 2**13)
    means = sum(item.members for item, (_, placement) in zip(items, loops, strict=True) if placement)
    assert division.slots <= 2 * means, "more than one number of 8 bytes for each weight vector"


@pytest.mark.parametrize("loop", [Loop(1, 8, 2**33, 1), Loop(1, 2**20, 2**20, 1), Loop(3, 2**35, 1, 1)])
def test_offsets_within_a_piece_are_32_bit_numbers(loop: Loop) -> None:
    from gradcentral.kernels.triton import division

    item = division._tile(loop, Placement.GRADIENT, 4, division.PIECE)
    assert (item.rows - 1) * item.jump + (item.vectors - 1) * item.stride < REACH
    assert item.parts * item.rows >= loop.outer
