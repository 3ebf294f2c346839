"""Drift: the change of eᵀw since a reference point, which is zero under placement ``"update"``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradcentral.diagnostics.centering_effect import norms, to_numbers
from gradcentral.local_shard import gathered
from gradcentral.projection import Pair, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Drift", "precise_means"]


class Drift:
    """The drift eᵀ(w − w⁰) = √M (mean(w) − mean(w⁰)) of each weight vector, with w⁰ the weights at a reference point.

    The first measurement of a parameter sets its reference; the references of ``pairs`` are set on creation.

    Source: Yong et al. 2020, eq. 4: GC keeps w on the hyperplane eᵀ(w − w⁰) = 0.
    """

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        # Means of w⁰; their weight vectors are None until a loaded reference is first used.
        self._references: dict[Tensor, tuple[WeightVectors | None, Tensor]] = {}
        for parameter, vectors in pairs:
            self.of(parameter, vectors)

    def of(self, parameter: Tensor, vectors: WeightVectors, means: Tensor | None = None) -> Tensor:
        """Measure the drift of one parameter, one number per weight vector; other weight vectors set a new reference.

        ``means`` are the parameter's `precise_means`, if known. A loaded reference of another size raises a ValueError.
        """
        means = precise_means(parameter, vectors) if means is None else means
        known, start = self._references.get(parameter, (vectors, means))
        if known is None and start.numel() != means.numel():
            raise ValueError(f"{start.numel()} weight vectors in the state, {means.numel()} in the parameter")
        if known not in (None, vectors):
            start = means
        start = start.to(means)
        self._references[parameter] = vectors, start
        return math.sqrt(vectors.fan_in) * (means - start)

    def total(self) -> float:
        """Return ‖eᵀ(w − w⁰)‖ over all weight vectors together (L2)."""
        known = [(p, vectors) for p, (vectors, _) in self._references.items() if vectors is not None]
        return math.hypot(*to_numbers(norms([self.of(p, vectors) for p, vectors in known])))

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Return the reference means by parameter name."""
        return {names[p]: means for p, (_, means) in self._references.items() if p in names}

    def load_state_dict(self, state: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
        """Replace all references by those of a `state_dict`."""
        self._references = {p: (None, state[name].flatten()) for p, name in names.items() if name in state}


def precise_means(parameter: Tensor, vectors: WeightVectors) -> Tensor:
    """Compute the mean of each weight vector, in one dimension, in double precision where the device supports it."""
    w = gathered(parameter.detach())
    if w.device.type != "mps":
        w = w.to(torch.complex128 if w.is_complex() else torch.float64)
    return unit_means(w, vectors).flatten()
