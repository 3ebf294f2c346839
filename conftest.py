"""Exclude modules from collection that need what may be missing: the adapters, the Triton kernels, and tasks with data.

The tests of each adapter, in tests/integrations, run its examples.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = ["src/gradcentral/integrations/*", "src/gradcentral/experiment/tasks/*"]
if not importlib.util.find_spec("triton"):
    collect_ignore_glob.append("src/gradcentral/kernels/triton/*")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Let every test and every example of a docstring draw the same numbers, whatever ran before."""
    torch.manual_seed(0)
