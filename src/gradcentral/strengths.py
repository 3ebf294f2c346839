"""The strength of each parameter of an optimizer, since its groups may have strengths of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from gradcentral.projection import Pair, Strength

__all__ = ["Strengths", "same_strength"]


class Strengths(NamedTuple):
    """The strengths of one step: numbers, or tensors on the device or while ``torch.compile`` traces."""

    default: Strength
    own: Mapping[Tensor, Strength]
    """The strengths of the parameters whose group has one."""

    def of(self, parameter: Tensor) -> Strength:
        """Return the strength of a parameter."""
        return self.own.get(parameter, self.default) if self.own else self.default

    def divide(self, pairs: list[Pair]) -> list[tuple[Strength, list[Pair]]]:
        """Return the parameters with each strength, in their order; one part if no group has a strength of its own."""
        if not self.own:
            return [(self.default, pairs)]
        parts: list[tuple[Strength, list[Pair]]] = []
        for pair in pairs:
            strength = self.of(pair[0])
            part = next((members for other, members in parts if same_strength(other, strength)), None)
            if part is None:
                parts.append((strength, [pair]))
            else:
                part.append(pair)
        return parts


def same_strength(one: Strength, other: Strength) -> bool:
    """Return whether two strengths are the same tensor or equal numbers."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one == other
