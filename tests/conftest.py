"""Settings and fixtures for all tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import settings

# In CI, Hypothesis draws the same examples in every run. No deadline: a slow machine is not a failure.
settings.register_profile("gradcentral", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=60)
settings.load_profile("gradcentral")


@pytest.fixture
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let ``torch.compile`` begin without the graphs, and its counters without the counts, of other tests."""
    import torch._dynamo.utils  # here, because few tests need the compiler

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
