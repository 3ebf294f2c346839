"""Parameters of which each rank holds a part (DTensors): what is centered there, and what takes a collective.

Where every weight vector is whole on some rank, that rank centers its own part like any tensor. Where weight vectors
are split between ranks, each rank sums its part of them, one all-reduce per process group adds up the sums of all
split parameters together, and the means are subtracted from the parts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcentral.layout import WeightLayout
from gradcentral.projection import Pair
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["Division", "Sharding", "Split", "any_sharded", "is_sharded", "local", "placed_like", "with_local"]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor, of which this rank holds a part (or a replica)."""
    module = sys.modules.get("torch.distributed.tensor")  # where it is not imported there are none
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some of the tensors are DTensors."""
    return any(kind not in _PLAIN and issubclass(kind, _dtensor_class()) for kind in set(map(type, tensors)))


def _dtensor_class() -> Any:
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    held = tensor._local_tensor
    return held.wait() if hasattr(held, "wait") else held  # a collective may be under way


def with_local(tensor: Tensor, held: Tensor) -> Tensor:
    """A DTensor like this one of which this rank holds ``held``; for a plain tensor that is all."""
    if not is_sharded(tensor):
        return held
    return type(tensor).from_local(
        held, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed_like(gradient: Tensor, parameter: DTensor, name: str) -> DTensor:
    """A gradient lying as its parameter does: an optimizer would have to bring it there anyway.

    Tensor parallelism leaves Partial gradients, whose sum over the ranks is still to be made.
    """
    if not is_sharded(gradient):
        raise TypeError(f"{name} is a DTensor, but its gradient is not: make it one with distribute_tensor")
    if gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


class _Labels(NamedTuple):
    """An axis some of whose parts a weight vector runs over: which output units the indices here belong to."""

    axis: int
    units: Tensor
    total: int


class Split(NamedTuple):
    """A parameter whose weight vectors are split between ranks."""

    parameter: DTensor
    fan_in: int
    """Of the whole weight vector, on all ranks."""
    spanned: tuple[int, ...]
    """Axes that a weight vector runs over from end to end."""
    labels: tuple[_Labels, ...]
    groups: tuple[dist.ProcessGroup, ...]
    """Over whose ranks the sums are added up, one after another."""

    @property
    def shape(self) -> list[int]:
        """The shape of the sums: that of the part here, with one entry per output unit."""
        shape = [*local(self.parameter).shape]
        for axis in self.spanned:
            shape[axis] = 1
        for axis, _, total in self.labels:
            shape[axis] = total
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """What sums are made in: f32 at least."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def sums(self, part: Tensor | None) -> Tensor:
        """The sum of this rank's part of every weight vector; zero where it has nothing to add."""
        if part is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=local(self.parameter).device)
        sums = part.sum(self.spanned, keepdim=True, dtype=self.dtype) if self.spanned else part.to(self.dtype)
        for axis, units, total in self.labels:
            shape = [*sums.shape[:axis], total, *sums.shape[axis + 1 :]]
            sums = sums.new_zeros(shape).index_add_(axis, units, sums)
        return sums

    def shift(self, means: Tensor) -> Tensor:
        """The means as something to subtract from this rank's part."""
        for axis, units, _ in self.labels:
            means = means.index_select(axis, units)
        return means


class Division(NamedTuple):
    """Parameters, divided by whether the weight vectors of which a rank holds elements are whole there."""

    whole: list[Pair]
    """Parameters, with the weight vectors of the part that this rank holds; plain tensors among them."""
    split: list[Split]
    names: Mapping[Tensor, str]

    def parts(self) -> list[Pair]:
        """The parts of the whole parameters."""
        return [(local(parameter), vectors) for parameter, vectors in self.whole]

    def place_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Bring the gradients of DTensors to where their parameters are, in memory that can be written."""
        for parameter in parameters:
            if parameter.grad is None or not is_sharded(parameter):
                continue
            gradient: Tensor = placed_like(parameter.grad, parameter, self.names.get(parameter, "a parameter"))
            held = local(gradient)
            if any(size > 1 and step == 0 for size, step in zip(held.shape, held.stride(), strict=True)):
                gradient = with_local(gradient, held.contiguous())  # expanded
            if gradient is not parameter.grad:
                parameter.grad = gradient

    def means(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        """The means of the split weight vectors, shaped to be subtracted from this rank's parts.

        All ranks must call it: what is sent depends on the parameters alone, so that a rank may have no part to add.
        """
        return self._means([split.sums(part) for split, part in zip(self.split, parts, strict=True)])

    def center_gradients_(self) -> None:
        """Center the gradients of the split parameters in place."""
        parts = self._gradients()
        for part, means in zip(parts, self.means(parts), strict=True):
            if part is not None:
                part.sub_(means)

    def centered_gradients(self) -> dict[Tensor, Tensor]:
        """The parts here of the split parameters' gradients, centered; the gradients stay as they are."""
        parts = self._gradients()
        found = zip(self.split, parts, self.means(parts), strict=True)
        return {split.parameter: (part - means).to(part.dtype) for split, part, means in found if part is not None}

    def sums(self) -> list[Tensor]:
        """The sums over the parts here of the split weight vectors, for `restore_`. No collective."""
        return [split.sums(local(split.parameter)) for split in self.split]

    def restore_(self, old: list[Tensor]) -> None:
        """Shift every split weight vector so that it has its old mean again.

        Means are linear: the mean of the change is that of the sums' changes, which takes one all-reduce, not two.
        """
        changes = [new - before for new, before in zip(self.sums(), old, strict=True)]
        for split, means in zip(self.split, self._means(changes), strict=True):
            local(split.parameter).sub_(means)

    def _gradients(self) -> list[Tensor | None]:
        gradients = [split.parameter.grad for split in self.split]
        return [None if gradient is None else local(gradient) for gradient in gradients]

    def _means(self, sums: list[Tensor]) -> list[Tensor]:
        added = _add_over_ranks(sums, [split.groups for split in self.split])
        return [split.shift(total / split.fan_in) for split, total in zip(self.split, added, strict=True)]


def _add_over_ranks(sums: list[Tensor], groups: list[tuple[dist.ProcessGroup, ...]]) -> list[Tensor]:
    """Each tensor summed over the ranks of its groups: one all-reduce per process group and dtype."""
    added = [*sums]
    kinds = {(group.group_name, total.dtype): group for total, own in zip(sums, groups, strict=True) for group in own}
    for (name, dtype), group in kinds.items():
        chosen = [
            position
            for position, own in enumerate(groups)
            if added[position].dtype == dtype and any(other.group_name == name for other in own)
        ]
        flat = torch.cat([added[position].flatten() for position in chosen])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [added[position].numel() for position in chosen])
        for position, piece in zip(chosen, pieces, strict=True):
            added[position] = piece.view_as(added[position])
    return added


class Sharding:
    """The division of some of a layout's parameters, kept until they are others."""

    def __init__(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._targets: list[Pair] | None = None
        self._division: Division | None = None
        self._trained: list[bool] = []

    def of(self, targets: list[Pair]) -> Division | None:
        """How the parameters are divided; None where none of them is a DTensor.

        Raises:
            ValueError: a parameter is sharded in a way that can't be centered (naming it, with the way out).
        """
        if targets is not self._targets or (self._division is not None and self._trained != _trained(targets)):
            sharded = any_sharded(parameter for parameter, _ in targets)
            self._division = divide(targets, self._layout.names) if sharded else None
            self._targets, self._trained = targets, _trained(targets)
        return self._division


def _trained(targets: list[Pair]) -> list[bool]:
    """Which of them train: layers may be unfrozen in the course of it."""
    return [parameter.requires_grad for parameter, _ in targets]


def divide(targets: list[Pair], names: Mapping[Tensor, str]) -> Division:
    """Divide parameters by whether their weight vectors are split between ranks.

    Depends on shapes and placements alone, so that all ranks find the same parameters split. Parameters that do not
    train are left out, and so are parts without elements unless they take part in a collective.
    """
    whole: list[Pair] = []
    split: list[Split] = []
    for parameter, vectors in targets:
        if not is_sharded(parameter):
            whole.append((parameter, vectors))
        elif parameter.requires_grad and parameter.device_mesh.get_coordinate() is not None:
            found = _divided(parameter, vectors, names[parameter])
            if isinstance(found, Split):
                split.append(found)
            elif local(parameter).numel():
                whole.append((parameter, found))
    # What is sent must be in the same order on all ranks, whose optimizers may have theirs in another.
    split.sort(key=lambda one: names[one.parameter])
    return Division(whole, split, names)


def _divided(parameter: DTensor, vectors: WeightVectors, name: str) -> WeightVectors | Split:
    """The weight vectors of the part that this rank holds, or how to sum over all parts."""
    mesh, held = parameter.device_mesh, local(parameter)
    cuts = _cuts(parameter, name)
    axes = runs_of_axes(vectors.for_shape(parameter.shape))
    if axes is None:
        raise ValueError(
            f"{name} is a DTensor of shape {tuple(parameter.shape)} whose weight vectors are those of the view "
            f"{vectors.view}, which cuts through its axes: give a view that splits or joins whole axes "
            f"(overrides={{{name!r}: …}}), or leave it alone (exclude=[{name!r}])"
        )
    dims: list[int] = []
    span: list[int] = []
    labels: list[_Labels] = []
    split_by: set[int] = set()
    for axis, runs in enumerate(axes):
        kinds = {spanned for _, spanned in runs}
        cutting = [dim for dim, _ in cuts[axis]]
        if len(kinds) < 2:
            runs = [(held.shape[axis], True in kinds)]
            split_by.update(cutting if True in kinds else ())
        else:
            here, pieces = _pieces(parameter, axis, cuts[axis])
            if len(here) != held.shape[axis]:
                raise ValueError(
                    f"{name}: this rank holds {held.shape[axis]} of axis {axis}, but its placements "
                    f"{parameter.placements} give it {len(here)}: make it with distribute_tensor or fully_shard"
                )
            inner = math.prod(size for size, _ in runs[1:])
            if runs[0][1] or not all(_is_aligned(piece, inner) for piece in pieces):
                split_by.update(cutting)
            labels.append(_labels(axis, runs, here.to(held.device)))
            runs = [(len(here) // inner, runs[0][1]), *runs[1:]]
        span += [len(dims) + position for position, (_, spanned) in enumerate(runs) if spanned]
        dims += [size for size, _ in runs]
    if not split_by:
        return WeightVectors(tuple(span), None if len(dims) == held.ndim else tuple(dims), tuple(held.shape))
    spanned_axes = tuple(axis for axis, runs in enumerate(axes) if runs and all(spanned for _, spanned in runs))
    groups = tuple(mesh.get_group(dim) for dim in sorted(split_by))
    return Split(parameter, vectors.fan_in, spanned_axes, tuple(labels), groups)


def _cuts(parameter: DTensor, name: str) -> list[list[tuple[int, Any]]]:
    """For each axis the mesh dimensions that cut it, with their placements."""
    cuts: list[list[tuple[int, Any]]] = [[] for _ in parameter.shape]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if axis is None or type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ValueError(
                f"{name} is a DTensor placed as {parameter.placements}, and only Shard and Replicate say which of its "
                f"elements a rank holds: redistribute it, or leave it alone (exclude=[{name!r}])"
            )
        if parameter.device_mesh.size(dim) > 1:
            cuts[axis].append((dim, placement))
    return cuts


def _pieces(parameter: DTensor, axis: int, cuts: list[tuple[int, Any]]) -> tuple[Tensor, list[Tensor]]:
    """The indices of an axis that this rank holds, and those of every rank."""
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
    """As Shard cuts an axis, and _StridedShard: each of ``factor`` chunks is cut, and a rank gets one cut of each."""
    rows = [_chunks(chunk, count) for chunk in _chunks(indices, factor)]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _chunks(indices: Tensor, count: int) -> list[Tensor]:
    size = -(-len(indices) // count)
    return [indices[position * size : (position + 1) * size] for position in range(count)]


def _is_aligned(indices: Tensor, inner: int) -> bool:
    """Whether the indices are some whole blocks of ``inner``, one after another."""
    if not len(indices):
        return True
    first, last = int(indices[0]), int(indices[-1])
    return last - first + 1 == len(indices) and first % inner == 0 and len(indices) % inner == 0


def _labels(axis: int, runs: list[tuple[int, bool]], indices: Tensor) -> _Labels:
    """Which output units the indices of an axis belong to, counting over what a weight vector does not span."""
    units = torch.zeros_like(indices)
    step = math.prod(size for size, _ in runs)
    for size, spanned in runs:
        step //= size
        if not spanned:
            units = units * size + indices // step % size
    return _Labels(axis, units, math.prod(size for size, spanned in runs if not spanned))


def runs_of_axes(vectors: WeightVectors) -> list[list[tuple[int, bool]]] | None:
    """Each axis of the parameter as runs (size, is it spanned), the slowest first; axes of size 1 have none.

    None where the view cuts through axes, so that an index of the view is no matter of single axes.

    Examples:
        A transposed convolution with 2 groups: of the axis "in" a weight vector runs over one group's part.

        >>> runs_of_axes(WeightVectors(span=(1, 3), view=(2, 4, 3, 5), shape=(8, 3, 5)))
        [[(2, False), (4, True)], [(3, False)], [(5, True)]]
    """
    assert vectors.shape is not None, "the runs are those of a parameter's axes: for_shape(tensor.shape)"
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
