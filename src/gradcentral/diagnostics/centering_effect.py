"""The effect of centering on a gradient, in five numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral.projection import positive_or_one, subtract_means_, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Effect", "combine_effects", "effects", "norms", "to_numbers"]


class Effect(NamedTuple):
    """The effect of Φ on one gradient g.

    Attributes:
        share: 1 − ‖Φ(g)‖²/‖g‖², the fraction of the energy that centering removes; 0 for a zero gradient, NaN for one
            with NaN or Inf.
        norm, centered_norm: ‖g‖ and ‖Φ(g)‖ (L2).
        largest, centered_largest: largest absolute entry of g and of Φ(g).
    """

    share: float
    norm: float
    centered_norm: float
    largest: float
    centered_largest: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between g and Φ(g): √(1 − share), since Φ is an orthogonal projection; NaN for g = 0."""
        return math.sqrt(max(1.0 - self.share, 0.0)) if self.norm > 0 else math.nan  # max(nan, 0.0) is NaN


def effects(gradients: Iterable[tuple[Tensor, WeightVectors | None]]) -> list[Effect]:
    """Measure the `Effect` of centering on each gradient; a gradient without weight vectors is not centered."""
    fan_ins, scalars = [], []
    with torch.no_grad():
        for gradient, vectors in gradients:
            g = gradient.to_dense() if gradient.layout != torch.strided else gradient
            # The squares of 1e-25 and 1e25 do not fit into float32, so the largest entry is scaled to 1.
            (largest,) = norms([g], torch.inf)
            g = (g.float() if g.dtype.itemsize < 4 else g) / positive_or_one(largest)
            if vectors is None:
                fan_ins.append(0)
                scalars += [largest, *norms([g]) * 3, largest.sign()]
            else:
                means = unit_means(g, vectors)
                centered = subtract_means_(g.clone(), means, vectors)
                fan_ins.append(g.numel() // means.numel())
                scalars += [largest, *norms([means, g, centered]), *norms([centered], torch.inf)]
    numbers = iter(to_numbers(scalars))
    found = []
    for fan_in in fan_ins:
        largest_entry, means_norm, norm, centered_norm, centered_largest = itertools.islice(numbers, 5)
        # `projection.share`, from norms that are already computed; rounding may exceed 1.
        share = min(fan_in * (means_norm / norm) ** 2, 1.0) if norm != 0 else 0.0
        norm, centered_norm, centered_largest = (n * largest_entry for n in (norm, centered_norm, centered_largest))
        found.append(Effect(share, norm, centered_norm, largest_entry, centered_largest))
    return found


def combine_effects(parts: Sequence[Effect]) -> Effect:
    """Compute the effect on several gradients taken as one vector."""
    parts = parts or [Effect(0.0, 0.0, 0.0, 0.0, 0.0)]
    _, part_norms, centered_norms, largest, centered_largest = zip(*parts, strict=True)
    norm = math.hypot(*part_norms)
    share = math.fsum(part.share * (part.norm / norm) ** 2 for part in parts) if norm != 0 else 0.0
    return Effect(share, norm, math.hypot(*centered_norms), max(largest), max(centered_largest))


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Compute the norm of each tensor as a scalar tensor: L2, or the largest absolute entry for ``order=inf``."""
    # In half precision, squares overflow and long sums stop growing.
    wide = [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
    return list(torch._foreach_norm(wide, order))


def to_numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Convert real scalar tensors, of any devices and dtypes, to Python floats in one copy to the host."""
    if not scalars:
        return []
    dtype = max((scalar.dtype for scalar in scalars), key=lambda dtype: dtype.itemsize)
    numbers: list[float] = torch.stack([scalar.to(scalars[0].device, dtype) for scalar in scalars]).tolist()
    return numbers
