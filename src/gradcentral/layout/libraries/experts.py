"""Mixtures of experts that keep all experts' weights in one tensor, in either of two layouts of the same names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from gradcentral.layout.libraries.reasons import BIAS
from gradcentral.layout.rules import Decision, LeaveAlone, Rules
from gradcentral.layout.shapes import unexpected_shape
from gradcentral.weight_vectors import WeightVectors

__all__ = ["experts"]

_INNER_SIZES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_dim")


def experts(transposed: bool | None = None) -> Rules:
    """Rules for experts stored as ``[e, o, i]``, or as ``[e, i, o]`` where they are transposed.

    Three witnesses, and all that speak must agree: the module's own ``is_transposed``, this table, and the size
    of the hidden layer, which is an output of the first projections and an input of the last one.

    Args:
        transposed: what is known of the class; None where only the module itself can tell.
    """
    return {
        "*_bias": BIAS,
        "gate_up_proj": _projection(transposed, multiple=2, hidden_is_output=True),
        "gate_proj": _projection(transposed, multiple=1, hidden_is_output=True),
        "up_proj": _projection(transposed, multiple=1, hidden_is_output=True),
        "down_proj": _projection(transposed, multiple=1, hidden_is_output=False),
    }


def _projection(
    known: bool | None, *, multiple: int, hidden_is_output: bool
) -> Callable[[nn.Module, Tensor], Decision]:
    def rule(module: nn.Module, tensor: Tensor) -> Decision:
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
            return LeaveAlone(
                f"{type(module).__name__} does not tell [expert, out, in] from [expert, in, out]", unknown=True
            )
        return WeightVectors(span=(1,) if transposed else (2,))

    return rule
