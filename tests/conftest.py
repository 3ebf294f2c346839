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
