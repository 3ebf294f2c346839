"""Settings for the tests with trainers, JAX and Keras. They run in environments of their own; see the Makefile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.torchvision_operators import declare_operators

# Models are built from configurations and data are made by the tests; nothing is downloaded, and nothing is reported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # Ultralytics writes its settings when it is imported
declare_operators()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Use one thread, since small operations are slower with several threads, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
