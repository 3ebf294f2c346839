"""Lets libraries import a torchvision whose compiled operators do not match the installed torch.

The build of torchvision on the package index belongs to a CUDA build of torch. Beside a CPU-only torch, importing it
raises an error, and so does importing Lightning, timm, peft and others that import it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["declare_operators"]

_libraries: list[torch.library.Library] = []  # a declaration exists as long as its library


def declare_operators() -> None:
    """Declare the operators that importing torchvision requires, with non-maximum suppression in plain torch."""
    try:
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _non_maximum_suppression, "CPU")
        _libraries.append(library)
        import torchvision.ops.boxes  # type: ignore[import-not-found,import-untyped,unused-ignore]

        torchvision.ops.boxes._assert_has_ops = lambda: None


def _non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    from torchvision.ops import box_iou  # type: ignore[import-not-found,import-untyped,unused-ignore]

    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        order = order[box_iou(boxes[order[:1]], boxes[order])[0] <= iou_threshold]
    return torch.stack(kept) if kept else order
