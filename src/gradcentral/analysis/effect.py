"""What centering does to gradients, in a few numbers each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral.projection import center, share
from gradcentral.vectors import WeightVectors

__all__ = ["Effect", "effects", "together"]


class Effect(NamedTuple):
    """What Φ does to one gradient g.

    Attributes:
        share: 1 − ‖Φ(g)‖²/‖g‖², the part of its energy that centering removes; 0 for a zero gradient, NaN
            for one that is not finite.
        norm, centered_norm: ‖g‖ and ‖Φ(g)‖ (L2).
        largest, centered_largest: the largest absolute entry of g and of Φ(g).
    """

    share: float
    norm: float
    centered_norm: float
    largest: float
    centered_largest: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between g and Φ(g): √(1 − share), Φ being an orthogonal projection; NaN for zero g."""
        if self.norm == 0 or math.isnan(self.share):
            return math.nan
        return math.sqrt(max(0.0, 1.0 - self.share))


def effects(gradients: Sequence[tuple[Tensor, WeightVectors | None]]) -> list[Effect]:
    """The `Effect` of centering on each gradient; without vectors it is left alone, and nothing changes.

    However many there are, numbers travel from the device to Python once.

    Examples:
        >>> import torch
        >>> from gradcentral import WeightVectors
        >>> effects([(torch.tensor([[3.0, 1.0]]), WeightVectors(span=(1,)))])[0].centered_norm
        1.4142135381698608
    """
    rows = []
    with torch.no_grad():
        for gradient, vectors in gradients:
            g = gradient.to_dense() if gradient.layout != torch.strided else gradient
            whole = [_norm(g), _largest(g)]
            if vectors is None:
                removed, after = torch.zeros_like(whole[0]), whole
            else:
                centered = center(g, vectors)
                removed, after = share(g, vectors).to(whole[0].dtype), [_norm(centered), _largest(centered)]
            rows.append(torch.stack([removed, whole[0], after[0], whole[1], after[1]]))
        if not rows:
            return []
        dtype = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)
        table = torch.stack([row.to(rows[0].device, dtype) for row in rows]).tolist()
    return [Effect(*row) for row in table]


def together(parts: Sequence[Effect]) -> Effect:
    """The effect on several gradients seen as one vector.

    Examples:
        >>> together([Effect(1.0, 3.0, 0.0, 3.0, 0.0), Effect(0.0, 4.0, 4.0, 4.0, 4.0)])
        Effect(share=0.36, norm=5.0, centered_norm=4.0, largest=4.0, centered_largest=4.0)
    """
    norm = math.hypot(*(part.norm for part in parts))
    removed = math.fsum(part.share * (part.norm / norm) ** 2 for part in parts) if norm != 0 else 0.0
    return Effect(
        share=removed,
        norm=norm,
        centered_norm=math.hypot(*(part.centered_norm for part in parts)),
        largest=max((part.largest for part in parts), default=0.0),
        centered_largest=max((part.centered_largest for part in parts), default=0.0),
    )


def _norm(tensor: Tensor, order: float = 2.0) -> Tensor:
    # Squares of half-precision numbers overflow, and sums of them stall.
    norm: Tensor = torch.linalg.vector_norm(tensor.float() if tensor.dtype.itemsize < 4 else tensor, order)
    return norm


def _largest(tensor: Tensor) -> Tensor:
    return _norm(tensor, torch.inf)
