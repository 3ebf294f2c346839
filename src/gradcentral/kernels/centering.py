"""Φ, means and their restoration for many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.forms import Placement, States, same_objects
from gradcentral.kernels.planner import KernelGroup, group_by_kernels, kernels_for
from gradcentral.projection import Pair, Strength, center_, center_regularized, restore_means_, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Centering", "Means"]


class Means(NamedTuple):
    """Means of weight vectors, as `Centering.means` returns them."""

    planned: list[Tensor]
    """One flat tensor per kernel call."""
    reference: list[Tensor]


class _PlannedGroup(NamedTuple):
    group: KernelGroup
    vectors: list[WeightVectors]
    plan: Any
    """A native or Triton plan."""

    @property
    def counts(self) -> list[int]:
        """Number of weight vectors of each tensor."""
        return [loop.groups * loop.units * loop.phases for loop in self.group.loops]

    def tensors(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return the tensors of this group."""
        return [tensor for tensor, _ in self.group.select(pairs)]

    def fitting(self, pairs: Sequence[Pair]) -> list[Tensor] | None:
        """Return the tensors of this group, or None if the plan does not fit them."""
        selected = self.group.select(pairs)
        tensors = [tensor for tensor, _ in selected]
        fits = same_objects([vectors for _, vectors in selected], self.vectors) and self.plan.fits(tensors)
        return tensors if fits else None


class Centering:
    """Repeated centering of many tensors: with kernels where possible, by the reference path elsewhere.

    Plans are reused while the tensors keep their shapes, strides, types and weight vectors.
    """

    def __init__(self) -> None:
        self._planned: list[_PlannedGroup] = []
        self._rest: list[int] = []
        self._count = -1
        self._regularized: tuple[Centering, Centering] | None = None
        self._parts: list[Centering] = []

    def part(self, position: int) -> Centering:
        """Return the plans of one of the parts into which the caller divides its tensors; part 0 is this object."""
        while len(self._parts) < position:
            self._parts.append(Centering())
        return self._parts[position - 1] if position else self

    def center_if_planned_(self, pairs: Sequence[Pair], strength: Strength = 1.0) -> bool:
        """Center every tensor in place if kernels process all of them and the plans still fit; otherwise do nothing.

        The caller need not check the tensors first: sparse, expanded or overlapping tensors never fit a plan.
        """
        fitting = None if self._rest else self._fitting(pairs)
        if fitting is None:
            return False
        for found, tensors in zip(self._planned, fitting, strict=True):
            found.plan.center_(tensors, strength)
        return True

    def center_all_(self, pairs: Sequence[Pair], strength: Strength = 1.0) -> None:
        """Center every tensor in place."""
        self._plan(pairs)
        for found in self._planned:
            found.plan.center_(found.tensors(pairs), strength)
        for position in self._rest:
            center_(*pairs[position], strength)

    def center_regularized_(
        self,
        gradients: Sequence[Pair],
        weights: Sequence[Tensor],
        l2: Sequence[float],
        scale: Tensor | None = None,
        strength: Strength = 1.0,
    ) -> None:
        """Replace every gradient in place by `center_regularized` of it, its weights and λ · scale."""
        self.center_all_([pair for pair, factor in zip(gradients, l2, strict=True) if factor == 0], strength)
        decayed = [position for position, factor in enumerate(l2) if factor != 0]
        if not decayed:
            return
        if self._regularized is None:
            self._regularized = Centering(), Centering()
        of_gradients, of_weights = self._regularized
        pairs = [gradients[position] for position in decayed]
        decaying = [(weights[position], gradients[position][1]) for position in decayed]
        factors = [l2[position] for position in decayed]
        of_gradients._plan(pairs)
        of_weights._plan(decaying)
        if not of_gradients._divides_like(of_weights):
            _center_regularized_by_reference_(pairs, decaying, factors, scale, strength)
            return
        for found, other in zip(of_gradients._planned, of_weights._planned, strict=True):
            means = other.plan.means(other.tensors(decaying))
            torch._foreach_mul_([*means.split(other.counts)], [-factor for factor in other.group.select(factors)])
            means = means if scale is None else means.mul_(scale.to(means.device))
            found.plan.shift_(found.tensors(pairs), means, strength)
        for position in of_gradients._rest:
            at = slice(position, position + 1)
            _center_regularized_by_reference_(pairs[at], decaying[at], factors[at], scale, strength)

    def means(self, pairs: Sequence[Pair]) -> Means:
        """Return the mean of every weight vector, to be passed to `restore_`."""
        self._plan(pairs)
        planned = [found.plan.means(found.tensors(pairs)) for found in self._planned]
        return Means(planned, [unit_means(*pairs[position]) for position in self._rest])

    def restore_(self, pairs: Sequence[Pair], means: Means, strength: Strength = 1.0) -> None:
        """Apply `restore_means_` to every tensor."""
        self._plan(pairs)
        for found, old in zip(self._planned, means.planned, strict=True):
            found.plan.restore_(found.tensors(pairs), old, strength)
        for position, old in zip(self._rest, means.reference, strict=True):
            tensor, vectors = pairs[position]
            restore_means_(tensor, old, vectors, strength)

    def _divides_like(self, other: Centering) -> bool:
        """Return whether the means of both, in the same positions, belong to the same weight vectors."""
        return self._rest == other._rest and [each.group for each in self._planned] == [
            each.group for each in other._planned
        ]

    def _fitting(self, pairs: Sequence[Pair]) -> list[list[Tensor]] | None:
        """Return the tensors of each planned group, or None if a plan does not fit them."""
        if len(pairs) != self._count or (pairs and kernels_for(pairs[0][0]) is None):
            return None
        fitting = []
        for found in self._planned:
            if (tensors := found.fitting(pairs)) is None:
                return None
            fitting.append(tensors)
        return fitting

    def _plan(self, pairs: Sequence[Pair]) -> None:
        if not self._rest and self._fitting(pairs) is not None:
            return
        groups, self._rest = group_by_kernels([tensor for tensor, _ in pairs], [vectors for _, vectors in pairs])
        self._count = len(pairs)
        self._planned = []
        for group in groups:
            tensors, of_tensors = map(list, zip(*group.select(pairs), strict=True))
            loops = [(loop, Placement.GRADIENT) for loop in group.loops]
            plan = group.kernels.Plan(None, [], tensors, States(), loops)
            self._planned.append(_PlannedGroup(group, of_tensors, plan))


def _center_regularized_by_reference_(
    gradients: Sequence[Pair], weights: Sequence[Pair], l2: Sequence[float], scale: Tensor | None, strength: Strength
) -> None:
    for (gradient, vectors), (w, _), factor in zip(gradients, weights, l2, strict=True):
        of_weights = factor if scale is None else scale * factor
        gradient.copy_(center_regularized(gradient, w, of_weights, vectors, strength))
