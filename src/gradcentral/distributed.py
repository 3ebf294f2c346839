"""Sharded parameters (DTensors): local centering where possible, one all-reduce for the rest.

If each weight vector lies entirely on one rank, that rank centers its shard like any other tensor. If weight vectors
are split between ranks, each rank sums its part of them, one all-reduce per process group and dtype adds the sums
of all split parameters, and the means are subtracted from the shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcentral.local_shard import (
    AxisRun,
    cuts_of,
    indices_of_shards,
    is_aligned,
    is_sharded,
    local,
    overlaps_itself,
    placed_like,
    runs_of_axes,
    with_local,
)
from gradcentral.projection import Pair, scaled
from gradcentral.strengths import Strengths
from gradcentral.weight_decay import L2
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Shards", "SplitParameter", "shards_of"]


class _UnitLabels(NamedTuple):
    """The output unit of each local index, for an axis that a weight vector spans only in part."""

    axis: int
    units: Tensor
    """int64 ``[local size of the axis]``"""
    n_units: int
    """Number of output units along the axis, on all ranks."""


class SplitParameter(NamedTuple):
    """A parameter whose weight vectors are split between ranks."""

    parameter: DTensor
    fan_in: int
    """M of the whole weight vector, over all ranks."""
    spanned: tuple[int, ...]
    """Axes that lie completely inside a weight vector."""
    labels: tuple[_UnitLabels, ...]
    groups: tuple[dist.ProcessGroup, ...]
    """Process groups over which the sums are added, one after another."""

    @property
    def shape(self) -> list[int]:
        """Shape of the sums: that of the local shard, with one entry per output unit."""
        shape = [*local(self.parameter).shape]
        for axis in self.spanned:
            shape[axis] = 1
        for label in self.labels:
            shape[label.axis] = label.n_units
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the sums: float32 or wider."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def sums(self, shard: Tensor | None) -> Tensor:
        """Sum the local part of every weight vector; zeros where this rank has no gradient."""
        if shard is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=local(self.parameter).device)
        sums = shard.sum(self.spanned, keepdim=True, dtype=self.dtype) if self.spanned else shard.to(self.dtype)
        for axis, units, n_units in self.labels:
            shape = [*sums.shape[:axis], n_units, *sums.shape[axis + 1 :]]
            sums = sums.new_zeros(shape).index_add_(axis, units, sums)
        return sums

    def broadcast(self, means: Tensor) -> Tensor:
        """Expand one mean per output unit to the local shard, ready to be subtracted from it."""
        for axis, units, _ in self.labels:
            means = means.index_select(axis, units)
        return means


@dataclass(frozen=True)  # not a NamedTuple, whose properties Dynamo of torch 2.8 does not trace
class Shards:
    """Parameters to center: those whose weight vectors are whole on this rank, and those split between ranks."""

    pairs: list[Pair]
    """All parameters, with the weight vectors of the layout."""
    whole: list[Pair]
    """Plain tensors, and DTensors whose weight vectors are whole, each with the weight vectors of its local shard."""
    split: list[SplitParameter]
    names: Mapping[Tensor, str]
    """Names of the layout's parameters; empty if nothing is sharded."""

    @property
    def sharded(self) -> bool:
        """Whether some of the parameters are DTensors."""
        return bool(self.names)

    def place_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Redistribute the gradients of DTensors to their parameters' placements, in writable memory."""
        for parameter in parameters:
            if parameter.grad is None or not is_sharded(parameter):
                continue
            gradient: Tensor = placed_like(parameter.grad, parameter, self.names.get(parameter, "a parameter"))
            held = local(gradient)
            if overlaps_itself(held):
                gradient = with_local(gradient, held.contiguous())
            if gradient is not parameter.grad:
                parameter.grad = gradient

    def center_split_gradients_(self, l2: L2 | None, strengths: Strengths) -> None:
        """Center the gradients of the split parameters in place, as `center_regularized` with ``l2``.

        This is a collective.
        """
        gradients = self._split_gradients()
        for split, gradient, means in zip(self.split, gradients, self._gradient_means(gradients, l2), strict=True):
            if gradient is not None:
                gradient.sub_(scaled(means, strengths.of(split.parameter)))

    def centered_split_gradients(self, l2: L2 | None, strengths: Strengths) -> dict[Tensor, Tensor]:
        """Return what `center_split_gradients_` writes, leaving ``p.grad`` unchanged. This is a collective."""
        gradients = self._split_gradients()
        found = zip(self.split, gradients, self._gradient_means(gradients, l2), strict=True)
        return {
            split.parameter: (g - scaled(means, strengths.of(split.parameter))).to(g.dtype)
            for split, g, means in found
            if g is not None
        }

    def split_sums(self) -> list[Tensor]:
        """Return the local sums of the split weight vectors, for `restore_split_means_`. This is not a collective."""
        return [split.sums(local(split.parameter)) for split in self.split]

    def restore_split_means_(self, old_sums: list[Tensor], strengths: Strengths) -> None:
        """Apply `restore_means_` to the split parameters, given their sums before the step. This is a collective.

        The mean is linear, so the mean of the change follows from the change of the sums: one all-reduce, not two.
        """
        if not self.split:
            return
        changes = [new - old for new, old in zip(self.split_sums(), old_sums, strict=True)]
        for split, means in zip(self.split, self._means(changes), strict=True):
            shift = torch.where(means.isfinite(), means, 0)
            local(split.parameter).sub_(scaled(shift, strengths.of(split.parameter)))

    def _split_gradients(self) -> list[Tensor | None]:
        gradients = [split.parameter.grad for split in self.split]
        return [None if gradient is None else local(gradient) for gradient in gradients]

    def _gradient_means(self, gradients: list[Tensor | None], l2: L2 | None) -> list[Tensor]:
        # Every rank takes part, with zeros where it has no gradient: the message depends only on the parameters.
        all_sums = []
        for split, gradient in zip(self.split, gradients, strict=True):
            sums = split.sums(gradient)
            if gradient is not None and l2 is not None and split.parameter in l2.factors:
                sums = sums + l2.of(split.parameter) * split.sums(local(split.parameter))
            all_sums.append(sums)
        return self._means(all_sums)

    def _means(self, sums: list[Tensor]) -> list[Tensor]:
        totals = _add_over_ranks(sums, [split.groups for split in self.split])
        return [split.broadcast(total / split.fan_in) for split, total in zip(self.split, totals, strict=True)]


def _add_over_ranks(sums: list[Tensor], groups: list[tuple[dist.ProcessGroup, ...]]) -> list[Tensor]:
    """Sum each tensor over the ranks of its groups, with one all-reduce per process group and dtype."""
    totals = [*sums]
    kinds = {(group.group_name, total.dtype): group for total, own in zip(sums, groups, strict=True) for group in own}
    for (name, dtype), group in kinds.items():
        chosen = [
            position
            for position, own in enumerate(groups)
            if totals[position].dtype == dtype and any(other.group_name == name for other in own)
        ]
        flat = torch.cat([totals[position].flatten() for position in chosen])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [totals[position].numel() for position in chosen])
        for position, piece in zip(chosen, pieces, strict=True):
            totals[position] = piece.view_as(totals[position])
    return totals


def shards_of(targets: list[Pair], names: Mapping[Tensor, str], frozen: bool = False) -> Shards:
    """Separate the weight vectors that this rank holds whole from those that are split between ranks.

    The result depends only on shapes and placements, so all ranks agree on which parameters are split. Unless
    ``frozen``, parameters without ``requires_grad`` are omitted; so are empty shards that take part in no collective.

    Raises:
        ValueError: a parameter is sharded in a way that cannot be centered (with its name and a remedy).
    """
    whole: list[Pair] = []
    split: list[SplitParameter] = []
    for parameter, vectors in targets:
        if not is_sharded(parameter):
            whole.append((parameter, vectors))
        elif (frozen or parameter.requires_grad) and parameter.device_mesh.get_coordinate() is not None:
            shard = _shard(parameter, vectors, names[parameter])
            if isinstance(shard, SplitParameter):
                split.append(shard)
            elif local(parameter).numel():
                whole.append((parameter, shard))
    # Collectives must run in the same order on all ranks, whose optimizers may list their parameters differently.
    split.sort(key=lambda one: names[one.parameter])
    return Shards(targets, whole, split, names)


def _shard(parameter: DTensor, vectors: WeightVectors, name: str) -> WeightVectors | SplitParameter:
    """Return the weight vectors of the local shard, or a `SplitParameter` if they are split between ranks."""
    mesh, held = parameter.device_mesh, local(parameter)
    cuts = cuts_of(parameter, name)
    axes = runs_of_axes(vectors.for_shape(parameter.shape))
    if axes is None:
        raise ValueError(
            f"{name} is a DTensor of shape {tuple(parameter.shape)} whose weight vectors use the view {vectors.view}, "
            "which cuts across its axes: use a view that splits or joins whole axes "
            f"(overrides={{{name!r}: …}}), or skip the parameter (exclude=[{name!r}])"
        )
    dims: list[int] = []
    span: list[int] = []
    labels: list[_UnitLabels] = []
    split_by: set[int] = set()
    for axis, runs in enumerate(axes):
        kinds = {run.spanned for run in runs}
        cutting = [dim for dim, _ in cuts[axis]]
        if len(kinds) < 2:
            runs = [AxisRun(held.shape[axis], True in kinds)]
            split_by.update(cutting if True in kinds else ())
        else:
            here, shards = indices_of_shards(parameter, axis, cuts[axis])
            if len(here) != held.shape[axis]:
                raise ValueError(
                    f"{name}: this rank holds {held.shape[axis]} entries of axis {axis}, but the placements "
                    f"{parameter.placements} give it {len(here)}: create it with distribute_tensor or fully_shard"
                )
            inner = math.prod(run.size for run in runs[1:])
            if runs[0].spanned or not all(is_aligned(indices, inner) for indices in shards):
                split_by.update(cutting)
            labels.append(_unit_labels(axis, runs, here.to(held.device)))
            runs = [AxisRun(len(here) // inner, runs[0].spanned), *runs[1:]]
        span += [len(dims) + position for position, run in enumerate(runs) if run.spanned]
        dims += [run.size for run in runs]
    if not split_by:
        return WeightVectors(tuple(span), None if len(dims) == held.ndim else tuple(dims), tuple(held.shape))
    spanned_axes = tuple(axis for axis, runs in enumerate(axes) if runs and all(run.spanned for run in runs))
    groups = tuple(mesh.get_group(dim) for dim in sorted(split_by))
    return SplitParameter(parameter, vectors.fan_in, spanned_axes, tuple(labels), groups)


def _unit_labels(axis: int, runs: list[AxisRun], indices: Tensor) -> _UnitLabels:
    """Number the output units that the indices of an axis belong to, by the runs that a weight vector does not span."""
    units = torch.zeros_like(indices)
    step = math.prod(size for size, _ in runs)
    for size, spanned in runs:
        step //= size
        if not spanned:
            units = units * size + indices // step % size
    return _UnitLabels(axis, units, math.prod(size for size, spanned in runs if not spanned))
