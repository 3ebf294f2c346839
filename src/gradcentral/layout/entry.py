"""What a layout says of one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradcentral.weight_vectors import WeightVectors

__all__ = ["Entry"]


@dataclass(frozen=True, eq=False)
class Entry:
    """What a layout says of one parameter."""

    name: str
    parameter: Tensor
    vectors: WeightVectors | None
    """The weight vectors, or None where the parameter is left alone."""
    origin: str
    """The rule that decided, as ``Class.parameter``, after the library it is for."""
    reason: str = ""
    """Why the parameter is left alone; empty where it is centered."""
    unknown: bool = False
    """Left alone because nobody has decided about it: it deserves a look."""
    aliases: tuple[str, ...] = ()
    """Further names of a tied parameter."""
    suggestion: str = ""
    """A line of code to paste that decides about an unknown parameter."""
