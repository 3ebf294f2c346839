"""Mixtures of experts that keep the weights of all experts in one tensor, stored under the same names in two orders."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from gradcentral.layout.rules import LeaveAlone, Rules, unexpected_shape

__all__ = ["experts"]

_HIDDEN_SIZES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_dim")


def experts(transposed: bool | None = None) -> Rules:
    """Rules for experts stored as ``"e o [i]"``, or as ``"e [i] o"`` if transposed.

    Known from the module's own ``is_transposed``, otherwise from the argument here, a property of the class. The size
    of the hidden layer, an output of the first projections and an input of the last one, must not contradict it, and
    decides where neither is known.
    """
    first = partial(_pattern, transposed, "o")
    return {
        "gate_up_proj": partial(first, 2),
        "gate_proj": partial(first, 1),
        "up_proj": partial(first, 1),
        "down_proj": partial(_pattern, transposed, "i", 1),
    }


def _pattern(
    transposed: bool | None, hidden_axis: str, multiple: int, module: nn.Module, tensor: Tensor
) -> str | LeaveAlone:
    if tensor.ndim != 3:
        return unexpected_shape(module, tensor, "three axes")
    if isinstance(flag := getattr(module, "is_transposed", None), bool):
        transposed = flag
    orders = [axes for axes, turned in (("eoi", False), ("eio", True)) if transposed in (None, turned)]
    sizes = [size for name in _HIDDEN_SIZES if isinstance(size := getattr(module, name, None), int)]
    if sizes:
        hidden = multiple * sizes[0]
        orders = [axes for axes in orders if tensor.shape[axes.index(hidden_axis)] == hidden]
        if not orders:
            return unexpected_shape(module, tensor, f"a hidden layer of {hidden} units")
    if len(orders) > 1:
        return LeaveAlone(f"{type(module).__name__} may be stored as 'e o [i]' or as 'e [i] o'", unknown=True)
    return " ".join(orders[0]).replace("i", "[i]")
