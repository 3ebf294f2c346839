"""Fixtures of the diagnostics tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradcentral.experiment import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, since the networks are tiny and a second one only waits on a busy machine."""
    with threads.one_thread():
        yield
