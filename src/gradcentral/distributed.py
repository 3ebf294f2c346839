"""Sharded parameters (DTensors): what each rank centers locally, and the one collective that the rest needs.

Where every weight vector lies whole on some rank, that rank centers its shard like any tensor. Where weight vectors are
split between ranks, each rank sums its part of them, one all-reduce per process group adds the sums of all split
parameters, and the means are subtracted from the shards.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcentral.projection import Pair
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "Shards",
    "SplitParameter",
    "any_sharded",
    "is_expanded",
    "is_sharded",
    "local",
    "placed_like",
    "shards_of",
    "with_local",
]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor, of which this rank holds a shard or a replica."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has created a DTensor before importing it
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some of the tensors are DTensors."""
    return any(kind not in _PLAIN and issubclass(kind, _dtensor_class()) for kind in set(map(type, tensors)))


def _dtensor_class() -> Any:
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that nothing can be written in place."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, sharing its memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    held = tensor._local_tensor
    return held.wait() if hasattr(held, "wait") else held  # a collective may still be running


def with_local(tensor: Tensor, held: Tensor) -> Tensor:
    """Return a DTensor like ``tensor`` with the local shard ``held``; for a plain tensor, ``held`` itself."""
    if not is_sharded(tensor):
        return held
    return type(tensor).from_local(
        held, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed_like(gradient: Tensor, parameter: DTensor, name: str) -> DTensor:
    """Redistribute a gradient to its parameter's placements, where an optimizer needs it anyway.

    Tensor parallelism leaves Partial gradients, which are still to be summed over the ranks.

    Raises:
        TypeError: the gradient is not a DTensor.
    """
    if not is_sharded(gradient):
        raise TypeError(f"{name} is a DTensor, but its gradient is not: convert it with distribute_tensor")
    if gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


class _UnitLabels(NamedTuple):
    """An axis of which a weight vector spans only some parts: the output unit that each local index belongs to."""

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


class Shards(NamedTuple):
    """Parameters to center, by whether this rank holds their weight vectors whole or shares them with other ranks."""

    targets: list[Pair]
    """All of them, as the layout has them."""
    whole: list[Pair]
    """Parameters, plain tensors among them, with the weight vectors of the local shard."""
    split: list[SplitParameter]
    names: Mapping[Tensor, str]
    """Of the layout's parameters; empty where nothing is sharded."""

    def local_pairs(self) -> list[Pair]:
        """Return the local shards of the whole parameters with their weight vectors."""
        return [(local(parameter), vectors) for parameter, vectors in self.whole]

    def place_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Redistribute the gradients of DTensors to their parameters' placements, in memory that can be written."""
        for parameter in parameters:
            if parameter.grad is None or not is_sharded(parameter):
                continue
            gradient: Tensor = placed_like(parameter.grad, parameter, self.names.get(parameter, "a parameter"))
            held = local(gradient)
            if is_expanded(held):
                gradient = with_local(gradient, held.contiguous())
            if gradient is not parameter.grad:
                parameter.grad = gradient

    def center_split_gradients_(self) -> None:
        """Center the gradients of the split parameters in place. A collective."""
        gradients = self._split_gradients()
        for gradient, means in zip(gradients, self._gradient_means(gradients), strict=True):
            if gradient is not None:
                gradient.sub_(means)

    def centered_split_gradients(self) -> dict[Tensor, Tensor]:
        """Return the centered local gradient of each split parameter; ``p.grad`` is unchanged. A collective."""
        gradients = self._split_gradients()
        found = zip(self.split, gradients, self._gradient_means(gradients), strict=True)
        return {split.parameter: (g - means).to(g.dtype) for split, g, means in found if g is not None}

    def split_sums(self) -> list[Tensor]:
        """Return the local sums of the split weight vectors, for `restore_split_means_`. Not a collective."""
        return [split.sums(local(split.parameter)) for split in self.split]

    def restore_split_means_(self, old_sums: list[Tensor]) -> None:
        """Placement "update" for the split parameters: `restore_means_` with the means of before. A collective.

        Means are linear, so the mean of the change follows from the change of the sums: one all-reduce, not two.
        """
        changes = [new - old for new, old in zip(self.split_sums(), old_sums, strict=True)]
        for split, means in zip(self.split, self._means(changes), strict=True):
            local(split.parameter).sub_(means)

    def _split_gradients(self) -> list[Tensor | None]:
        gradients = [split.parameter.grad for split in self.split]
        return [None if gradient is None else local(gradient) for gradient in gradients]

    def _gradient_means(self, gradients: list[Tensor | None]) -> list[Tensor]:
        # Every rank takes part, with zeros where it has no gradient: what is sent depends on the parameters alone.
        return self._means([split.sums(gradient) for split, gradient in zip(self.split, gradients, strict=True)])

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


def shards_of(targets: list[Pair], names: Mapping[Tensor, str]) -> Shards:
    """Find out which weight vectors this rank holds whole and which are split between ranks.

    The answer depends on shapes and placements alone, so all ranks agree on which parameters are split. Frozen
    parameters are left out, and so are empty shards that take part in no collective.

    Raises:
        ValueError: a parameter is sharded in a way that cannot be centered (with its name and a remedy).
    """
    whole: list[Pair] = []
    split: list[SplitParameter] = []
    for parameter, vectors in targets:
        if not is_sharded(parameter):
            whole.append((parameter, vectors))
        elif parameter.requires_grad and parameter.device_mesh.get_coordinate() is not None:
            shard = _shard(parameter, vectors, names[parameter])
            if isinstance(shard, SplitParameter):
                split.append(shard)
            elif local(parameter).numel():
                whole.append((parameter, shard))
    # Collectives must run in the same order on all ranks, whose optimizers may list their parameters differently.
    split.sort(key=lambda one: names[one.parameter])
    return Shards(targets, whole, split, names)


# The sharding algebra. Each axis of a parameter is written as *runs*: factors of its size, slowest first, each of which
# lies inside a weight vector ("spanned") or counts output units. [in = (g [i])] has the runs (g, no), (i, yes). A mesh
# dimension that cuts a spanned run splits weight vectors between ranks; one that cuts between output units does not.


def _shard(parameter: DTensor, vectors: WeightVectors, name: str) -> WeightVectors | SplitParameter:
    """Return the weight vectors of the local shard, or, where ranks share them, how to sum over all shards."""
    mesh, held = parameter.device_mesh, local(parameter)
    cuts = _cuts(parameter, name)
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
        kinds = {spanned for _, spanned in runs}
        cutting = [dim for dim, _ in cuts[axis]]
        if len(kinds) < 2:
            runs = [(held.shape[axis], True in kinds)]
            split_by.update(cutting if True in kinds else ())
        else:
            here, shards = _indices_of_shards(parameter, axis, cuts[axis])
            if len(here) != held.shape[axis]:
                raise ValueError(
                    f"{name}: this rank holds {held.shape[axis]} entries of axis {axis}, but the placements "
                    f"{parameter.placements} give it {len(here)}: create it with distribute_tensor or fully_shard"
                )
            inner = math.prod(size for size, _ in runs[1:])
            if runs[0][1] or not all(_is_aligned(indices, inner) for indices in shards):
                split_by.update(cutting)
            labels.append(_unit_labels(axis, runs, here.to(held.device)))
            runs = [(len(here) // inner, runs[0][1]), *runs[1:]]
        span += [len(dims) + position for position, (_, spanned) in enumerate(runs) if spanned]
        dims += [size for size, _ in runs]
    if not split_by:
        return WeightVectors(tuple(span), None if len(dims) == held.ndim else tuple(dims), tuple(held.shape))
    spanned_axes = tuple(axis for axis, runs in enumerate(axes) if runs and all(spanned for _, spanned in runs))
    groups = tuple(mesh.get_group(dim) for dim in sorted(split_by))
    return SplitParameter(parameter, vectors.fan_in, spanned_axes, tuple(labels), groups)


def _cuts(parameter: DTensor, name: str) -> list[list[tuple[int, Any]]]:
    """Return, for each axis, the mesh dimensions that shard it, with their placements."""
    cuts: list[list[tuple[int, Any]]] = [[] for _ in parameter.shape]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if axis is None or type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ValueError(
                f"{name} is a DTensor with placements {parameter.placements}, of which only Shard and Replicate can be "
                f"centered: redistribute it, or skip it (exclude=[{name!r}])"
            )
        if parameter.device_mesh.size(dim) > 1:
            cuts[axis].append((dim, placement))
    return cuts


def _indices_of_shards(parameter: DTensor, axis: int, cuts: list[tuple[int, Any]]) -> tuple[Tensor, list[Tensor]]:
    """Return the indices of an axis that this rank holds, and those of every rank."""
    mesh: DeviceMesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    pieces, mine = [torch.arange(parameter.shape[axis])], 0
    for dim, placement in cuts:
        count = mesh.size(dim)
        factor = getattr(placement, "split_factor", 1)
        pieces = [part for piece in pieces for part in _cut(piece, count, factor)]
        mine = mine * count + coordinate[dim]
    return pieces[mine], pieces


def _cut(indices: Tensor, count: int, factor: int) -> list[Tensor]:
    """Cut an axis as Shard does, or _StridedShard: each of ``factor`` chunks is cut and a rank gets one cut of each."""
    cuts = [_chunks(chunk, count) for chunk in _chunks(indices, factor)]
    return [torch.cat(cut) for cut in zip(*cuts, strict=True)]


def _chunks(indices: Tensor, count: int) -> list[Tensor]:
    size = -(-len(indices) // count)
    return [indices[position * size : (position + 1) * size] for position in range(count)]


def _is_aligned(indices: Tensor, inner: int) -> bool:
    """Whether the indices form whole consecutive blocks of size ``inner``."""
    if not len(indices):
        return True
    first, last = int(indices[0]), int(indices[-1])
    return last - first + 1 == len(indices) and first % inner == 0 and len(indices) % inner == 0


def _unit_labels(axis: int, runs: list[tuple[int, bool]], indices: Tensor) -> _UnitLabels:
    """Number the output units that the indices of an axis belong to, by the runs that a weight vector does not span."""
    units = torch.zeros_like(indices)
    step = math.prod(size for size, _ in runs)
    for size, spanned in runs:
        step //= size
        if not spanned:
            units = units * size + indices // step % size
    return _UnitLabels(axis, units, math.prod(size for size, spanned in runs if not spanned))


def runs_of_axes(vectors: WeightVectors) -> list[list[tuple[int, bool]]] | None:
    """Return each axis of the parameter as runs (size, is it spanned), slowest first; axes of size 1 have none.

    None where the view cuts across axes, so that an index of the view depends on several axes of the parameter.

    Examples:
        A transposed convolution with 2 groups: of the axis "in", a weight vector spans one group's part.

        >>> runs_of_axes(WeightVectors(span=(1, 3), view=(2, 4, 3, 5), shape=(8, 3, 5)))
        [[(2, False), (4, True)], [(3, False)], [(5, True)]]
    """
    assert vectors.shape is not None, "call for_shape(tensor.shape) first"
    dims = iter(enumerate(vectors.dims))
    axis, left = -1, 1
    found: list[list[tuple[int, bool]]] = []
    for rest in vectors.shape:
        runs: list[tuple[int, bool]] = []
        while rest > 1:
            while left == 1:
                axis, left = next(dims)
            size = min(rest, left)
            if rest % size or left % size:
                return None
            rest, left = rest // size, left // size
            spanned = axis in vectors.span
            if runs and runs[-1][1] == spanned:
                size *= runs.pop()[0]
            runs.append((size, spanned))
        found.append(runs)
    return found
