"""The line of code that decides about a parameter nobody has decided about."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

__all__ = ["suggestion"]


def suggestion(name: str, owner: nn.Module, local_name: str, tensor: Tensor) -> str:
    """A line to paste, which leaves the parameter alone until it is edited; empty for what has one axis."""
    if is_lazy(tensor) or tensor.ndim <= 1:
        return ""
    cls: type = type_before_parametrizations(owner)
    path = cls.__qualname__ if cls.__module__ == "__main__" else f"{cls.__module__}.{cls.__qualname__}"
    if "<locals>" in path or path.startswith("torch.nn."):
        line = f'gradcentral.weight_layout(model, overrides={{"{name}": None}})'
    else:
        line = f'gradcentral.register_layout({path}, "{_of_every_item(local_name)}", None)'
    return f"{line}  # {'×'.join(map(str, tensor.shape))}; {_choices(tensor.ndim)}"


def _choices(ndim: int) -> str:
    if ndim == 2:
        return "not None but WeightVectors(span=(1,)) if used as linear(x, w), span=(0,) if as x @ w"
    return "not None but WeightVectors(span=...) if it is a weight: the axes that one output unit sums over"


def _of_every_item(local_name: str) -> str:
    container, dot, _ = local_name.partition(".")
    return f"{container}.*" if dot else local_name
