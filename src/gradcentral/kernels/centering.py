"""Φ, means and their restoration for many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradcentral.kernels.forms import Placement, States, same_objects
from gradcentral.kernels.planner import KernelGroup, group_by_kernels, kernels_for
from gradcentral.projection import Pair, center_, restore_means_, unit_means
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

    def tensors(self, pairs: Sequence[Pair]) -> list[Tensor]:
        return [tensor for tensor, _ in self.group.select(pairs)]

    def fits(self, pairs: Sequence[Pair]) -> bool:
        vectors = [vectors for _, vectors in self.group.select(pairs)]
        return same_objects(vectors, self.vectors) and self.plan.fits(self.tensors(pairs))


class Centering:
    """Repeated centering of many tensors: with kernels where possible, by the reference path elsewhere.

    Plans are reused while the tensors keep their shapes, strides, types and weight vectors.
    """

    def __init__(self) -> None:
        self._planned: list[_PlannedGroup] = []
        self._rest: list[int] = []
        self._count = -1

    def center_if_planned_(self, pairs: Sequence[Pair]) -> bool:
        """Center every tensor in place if kernels process all of them and the plans still fit; otherwise do nothing.

        The caller need not check the tensors first: sparse, expanded or overlapping tensors never fit a plan.
        """
        if self._rest or not self._fits(pairs):
            return False
        self._center_planned_(pairs)
        return True

    def center_all_(self, pairs: Sequence[Pair]) -> None:
        """Center every tensor in place."""
        self._plan(pairs)
        self._center_planned_(pairs)
        for position in self._rest:
            center_(*pairs[position])

    def means(self, pairs: Sequence[Pair]) -> Means:
        """Return the mean of every weight vector, to be passed to `restore_`."""
        self._plan(pairs)
        planned = [found.plan.means(found.tensors(pairs)) for found in self._planned]
        return Means(planned, [unit_means(*pairs[position]) for position in self._rest])

    def restore_(self, pairs: Sequence[Pair], means: Means) -> None:
        """Apply `restore_means_` to every tensor."""
        self._plan(pairs)
        for found, old in zip(self._planned, means.planned, strict=True):
            found.plan.restore_(found.tensors(pairs), old)
        for position, old in zip(self._rest, means.reference, strict=True):
            tensor, vectors = pairs[position]
            restore_means_(tensor, old, vectors)

    def _center_planned_(self, pairs: Sequence[Pair]) -> None:
        for found in self._planned:
            found.plan.center_(found.tensors(pairs))

    def _fits(self, pairs: Sequence[Pair]) -> bool:
        return (
            len(pairs) == self._count
            and (not pairs or kernels_for(pairs[0][0]) is not None)
            and all(found.fits(pairs) for found in self._planned)
        )

    def _plan(self, pairs: Sequence[Pair]) -> None:
        if not self._rest and self._fits(pairs):
            return
        groups, self._rest = group_by_kernels([tensor for tensor, _ in pairs], [vectors for _, vectors in pairs])
        self._count = len(pairs)
        self._planned = []
        for group in groups:
            tensors, of_tensors = map(list, zip(*group.select(pairs), strict=True))
            loops = [(loop, Placement.GRADIENT) for loop in group.loops]
            plan = group.kernels.Plan(None, [], tensors, States(), loops)
            self._planned.append(_PlannedGroup(group, of_tensors, plan))
