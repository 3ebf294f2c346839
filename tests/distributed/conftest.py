"""Ranks to run cases on, kept for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Workers]:
    """A process group of two."""
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Workers]:
    """A process group of four."""
    workers = Workers(4)
    yield workers
    workers.stop()


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> Workers:
    """Two ranks, then four."""
    workers: Workers = request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks")
    return workers
