"""Pass batches of any common form through a model, and move them to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["loss_of", "predict", "to_device"]


def loss_of(model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
    """Compute the loss of a batch; see `predict`."""
    value = loss(*predict(model, batch))
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss: must return a scalar tensor, not {found}")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError("loss: does not depend on the model's parameters; compute it from the model's output")
    return value


def predict(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return output and target: of ``(input, …, target)`` by ``model(input, …)``, of a mapping by ``model(**batch)``.

    The target of a mapping is the mapping itself.
    """
    if isinstance(batch, Mapping):
        return model(**batch), batch
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        found = f"{len(batch)} elements" if isinstance(batch, (list, tuple)) else f"a {type(batch).__name__}"
        raise TypeError(f"batches: each batch must be a tuple (input, …, target) or a mapping, not {found}")
    *inputs, target = batch
    return model(*inputs), target


def to_device(value: Any, device: torch.device | str) -> Any:
    """Move everything in a batch that has a ``to`` method, inside mappings, tuples and lists of any depth.

    Outside ``torch.inference_mode``, tensors created in it are copied, because autograd does not accept them.
    """
    if callable(getattr(value, "to", None)):  # a tensor, a packed sequence, a tokenizer's batch
        moved = value.to(device)
        if isinstance(moved, Tensor) and moved.is_inference() and not torch.is_inference_mode_enabled():
            return moved.clone()
        return moved
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))  # the constructor of a named tuple
        return make(to_device(item, device) for item in value)
    return value
