"""Fixtures for the diagnostics tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradcentral.experiment import determinism


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, since the networks are tiny and more threads only wait for each other on a busy machine."""
    with determinism.one_thread():
        yield
