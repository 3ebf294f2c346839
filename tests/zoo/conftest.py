"""Fixtures for the tests on models of other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from configurations, never downloaded


def _declare_operators_of_torchvision() -> None:
    """Let timm import a torchvision whose compiled operators do not match a CPU-only torch; no test calls them."""
    try:
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the declaration exists as long as this object
    except ImportError:
        pass


_declared: list[torch.library.Library] = []
_declare_operators_of_torchvision()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Use one thread, since small operations are slower with several threads, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
