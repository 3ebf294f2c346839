"""What the tests share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# A failing example must fail again on the next run, on every machine; a slow machine is no failure.
settings.register_profile("gradcentral", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=60)
settings.load_profile("gradcentral")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
