"""What the tests of the analysis share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradcentral.experiment import determinism


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are tiny, and two threads wait for each other where the machine is busy."""
    with determinism.one_thread():
        yield
