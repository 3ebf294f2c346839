"""One DTensor: its local shard, and which indices of each axis every rank holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "AxisRun",
    "any_sharded",
    "cuts_of",
    "gathered",
    "indices_of_shards",
    "is_aligned",
    "is_on_this_rank",
    "is_sharded",
    "local",
    "overlaps_itself",
    "placed_like",
    "runs_of_axes",
    "with_local",
]

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether a tensor is a DTensor, of which this rank holds a shard or a replica."""
    module = sys.modules.get("torch.distributed.tensor")  # before this import no DTensor can exist
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether some of the tensors are DTensors."""
    others = {*map(type, tensors)}.difference(_PLAIN)  # Dynamo of torch 2.8 does not trace the operator -
    return bool(others) and any(issubclass(kind, _dtensor_class()) for kind in others)


def _dtensor_class() -> Any:
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether several elements may share memory (``expand``, ``unfold``), so that none can be written in place.

    It is false for all dense and sliced tensors, and true for a few unusual strides although they do not overlap.
    """
    if tensor.is_contiguous():  # also avoids symbolic strides, which Dynamo cannot represent
        return False
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1 and stride <= extent:
            return True
        extent += (size - 1) * stride
    return False


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, which shares its memory, or a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    held = tensor._local_tensor
    return held.wait() if hasattr(held, "wait") else held  # a collective may still be running


def is_on_this_rank(tensor: Tensor) -> bool:
    """Return whether this rank takes part in the mesh of a DTensor; True for a plain tensor."""
    return not is_sharded(tensor) or tensor.device_mesh.get_coordinate() is not None


def gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor's value on all ranks as a plain tensor, or a plain tensor itself. This is a collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def with_local(tensor: Tensor, held: Tensor) -> Tensor:
    """Return a DTensor like ``tensor`` with the local shard ``held``; for a plain tensor, ``held`` itself."""
    if not is_sharded(tensor):
        return held
    return type(tensor).from_local(
        held, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed_like(gradient: Tensor, parameter: DTensor, name: str) -> DTensor:
    """Redistribute a gradient to its parameter's placements, which an optimizer needs anyway.

    Tensor parallelism leaves Partial gradients, which are still to be summed over the ranks.

    Raises:
        TypeError: the gradient is not a DTensor.
    """
    if not is_sharded(gradient):
        raise TypeError(f"{name} is a DTensor, but its gradient is not: convert it with distribute_tensor")
    if gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


# The sharding algebra. Each axis of a parameter is written as *runs*: factors of its size, slowest first, each of which
# lies inside a weight vector (is spanned) or counts output units. The axis (g [i]) has the runs (g, not spanned) and
# (i, spanned). A mesh dimension that cuts a spanned run splits weight vectors between ranks; one that cuts between
# output units does not.


class AxisRun(NamedTuple):
    """A factor of an axis."""

    size: int
    spanned: bool
    """Whether it lies inside a weight vector."""


def runs_of_axes(vectors: WeightVectors) -> list[list[AxisRun]] | None:
    """Return each axis of the parameter as runs, slowest first; axes of size 1 have none.

    Return None if the view cuts across axes, so that an index of the view depends on several axes of the parameter.

    Examples:
        A transposed convolution with 2 groups: of the axis "in", a weight vector spans one group's part.

        >>> vectors = WeightVectors(span=(1, 3), view=(2, 4, 3, 5), shape=(8, 3, 5))
        >>> [[tuple(run) for run in runs] for runs in runs_of_axes(vectors)]
        [[(2, False), (4, True)], [(3, False)], [(5, True)]]
    """
    assert vectors.shape is not None, "call for_shape(tensor.shape) first"
    dims = iter(enumerate(vectors.dims))
    axis, left = -1, 1
    found: list[list[AxisRun]] = []
    for rest in vectors.shape:
        runs: list[AxisRun] = []
        while rest > 1:
            while left == 1:
                axis, left = next(dims)
            size = min(rest, left)
            if rest % size or left % size:
                return None
            rest, left = rest // size, left // size
            spanned = axis in vectors.span
            if runs and runs[-1].spanned == spanned:
                size *= runs.pop().size
            runs.append(AxisRun(size, spanned))
        found.append(runs)
    return found


def cuts_of(parameter: DTensor, name: str) -> list[list[tuple[int, Any]]]:
    """Return, for each axis, the mesh dimensions that shard it, with their placements."""
    cuts: list[list[tuple[int, Any]]] = [[] for _ in parameter.shape]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if axis is None or type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ValueError(
                f"{name} is a DTensor with placements {parameter.placements}, but only Shard and Replicate can be "
                f"centered: redistribute it, or skip it (exclude=[{name!r}])"
            )
        if parameter.device_mesh.size(dim) > 1:
            cuts[axis].append((dim, placement))
    return cuts


def indices_of_shards(parameter: DTensor, axis: int, cuts: list[tuple[int, Any]]) -> tuple[Tensor, list[Tensor]]:
    """Return the indices of an axis that this rank holds, and those of every rank."""
    mesh: DeviceMesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    pieces, mine = [torch.arange(parameter.shape[axis], dtype=torch.int64, device="cpu")], 0
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


def is_aligned(indices: Tensor, inner: int) -> bool:
    """Return whether the indices form whole consecutive blocks of size ``inner``."""
    if not len(indices):
        return True
    first, last = int(indices[0]), int(indices[-1])
    return last - first + 1 == len(indices) and first % inner == 0 and len(indices) % inner == 0
