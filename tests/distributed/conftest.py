"""Process groups that run cases, shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Workers]:
    """Return a process group of two ranks."""
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Workers]:
    """Return a process group of four ranks."""
    workers = Workers(4)
    yield workers
    workers.stop()


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Workers:
    """Return a process group with as many ranks as the test's parameter ``ranks``."""
    workers: Workers = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])
    return workers
