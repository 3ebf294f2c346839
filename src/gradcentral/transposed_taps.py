"""The taps of a transposed convolution that reach one output. Pure Python: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["SPLIT", "Taps", "taps_of"]

SPLIT = "([m] s)"
"""The pattern of an axis whose taps belong to several phases: m taps in each of s phases."""


class Taps(NamedTuple):
    """One axis of the kernel of a transposed convolution."""

    size: int
    phases: int
    """An input at n reaches the outputs n · stride + t · dilation through the taps t. So the taps that reach one output
    are those of one phase: they are equal modulo stride / gcd(stride, dilation)."""

    @property
    def pattern(self) -> str:
        """The axis in the notation of `WeightVectors.parse`."""
        if self.phases == 1 or self.is_uneven:
            return "[k]"
        return SPLIT if self.size > self.phases else "k"

    @property
    def is_uneven(self) -> bool:
        """Whether some phases have more taps than others; no view describes weight vectors of unequal sizes."""
        return self.size > self.phases and self.size % self.phases != 0


def taps_of(sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Taps]:
    """Return the taps along each axis of a kernel."""
    settings = zip(sizes, strides, dilations, strict=True)
    return [Taps(size, stride // math.gcd(stride, dilation)) for size, stride, dilation in settings]
