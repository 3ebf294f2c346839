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


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Workers:
    """As many ranks as the test's parameter ``ranks`` says."""
    workers: Workers = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])
    return workers
