"""Fixtures for the tests on models of other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.torchvision_operators import declare_operators

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from configurations, never downloaded
declare_operators()  # timm imports torchvision


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Use one thread, since small operations are slower with several threads, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
