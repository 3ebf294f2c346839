"""Mixtures of experts that keep the weights of all experts in one tensor, stored under the same names in two orders."""

from __future__ import annotations

from torch import Tensor, nn

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, Rule, Rules, unexpected_shape

__all__ = ["experts"]

_INNER_SIZES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_dim")


def experts(transposed: bool | None = None) -> Rules:
    """Rules for experts stored as ``"e o [i]"``, or as ``"e [i] o"`` if transposed.

    There are three sources of evidence, which must not contradict each other: the module's own ``is_transposed``
    (which takes precedence over the table's), the argument here, and the size of the hidden layer, which is an output
    of the first projections and an input of the last one.

    Args:
        transposed: what is known about the class; None if only the module itself can tell.
    """
    first = dict.fromkeys(("gate_proj", "up_proj"), _projection(transposed, multiple=1, hidden_is_output=True))
    return {
        "*_bias": skip.BIAS,
        "gate_up_proj": _projection(transposed, multiple=2, hidden_is_output=True),
        **first,
        "down_proj": _projection(transposed, multiple=1, hidden_is_output=False),
    }


def _projection(known: bool | None, *, multiple: int, hidden_is_output: bool) -> Rule:
    def rule(module: nn.Module, tensor: Tensor) -> str | LeaveAlone:
        if tensor.ndim != 3:
            return unexpected_shape(module, tensor, "three axes")
        flag = getattr(module, "is_transposed", None)
        transposed = flag if isinstance(flag, bool) else known
        sizes = [size for name in _INNER_SIZES if isinstance(size := getattr(module, name, None), int)]
        if sizes:
            hidden = multiple * sizes[0]
            # The hidden units are on axis 2 if they are outputs and transposed, or inputs and not transposed.
            possible = {(axis == 2) == hidden_is_output for axis in (1, 2) if tensor.shape[axis] == hidden}
            if not possible or (transposed is not None and transposed not in possible):
                return unexpected_shape(module, tensor, f"a hidden layer of {hidden} units")
            if transposed is None and len(possible) == 1:
                transposed = possible.pop()
        if transposed is None:
            return LeaveAlone(f"{type(module).__name__} may be stored as 'e o [i]' or as 'e [i] o'", unknown=True)
        return "e [i] o" if transposed else "e o [i]"

    return rule
