"""Φ as operators of torch: under ``torch.compile`` the centering of all tensors is one node of the graph.

The compiler sees four operators and their fake implementations (shapes alone); what runs inside them is `Centering`,
natively where it can. Tensors that the operators do not take are centered by the reference path, traced like any code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels import Centering, Means
from gradcentral.projection import Pair, center, center_, subtract_means_, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["CompilableCentering", "center_traced_", "restore_traced_", "traced_center", "traced_means"]

_library: Any = torch.library.Library("gradcentral", "DEF")  # type: ignore[no-untyped-call]
# `vectors`: for each tensor the number of axes of its view, the view, how many of them are spanned, and which.
_library.define("center_(Tensor(a!)[] tensors, int[] vectors) -> ()", tags=torch.Tag.pt2_compliant_tag)
_library.define("center(Tensor[] tensors, int[] vectors) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
_library.define("means(Tensor[] tensors, int[] vectors) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define("restore_(Tensor(a!)[] tensors, Tensor means, int[] vectors) -> ()", tags=torch.Tag.pt2_compliant_tag)


class CompilableCentering(Centering):
    """`Centering` that puts an operator into the graph while ``torch.compile`` traces it, and is the plain one else."""

    def center_as_planned_(self, pairs: Sequence[Pair]) -> bool:
        """As in `Centering`; a trace knows no plan."""
        return not torch.compiler.is_compiling() and super().center_as_planned_(pairs)

    def center_(self, pairs: Sequence[Pair]) -> None:
        """Center every tensor in place."""
        (center_traced_ if torch.compiler.is_compiling() else super().center_)(pairs)

    def means(self, pairs: Sequence[Pair]) -> Means:
        """The mean of every weight vector, to be given back by `restore_`."""
        return (traced_means if torch.compiler.is_compiling() else super().means)(pairs)

    def restore_(self, pairs: Sequence[Pair], means: Means) -> None:
        """Give every weight vector its old mean again."""
        (restore_traced_ if torch.compiler.is_compiling() else super().restore_)(pairs, means)


def center_traced_(pairs: Sequence[Pair]) -> None:
    """`Centering.center_` in a graph."""
    served, rest = _divide(pairs)
    if served:
        torch.ops.gradcentral.center_([tensor for tensor, _ in served], _encode(served))
    for tensor, vectors in rest:
        center_(tensor, vectors)


def traced_center(pairs: Sequence[Pair]) -> list[Tensor]:
    """Φ of every tensor, as new tensors, in a graph."""
    served, _ = _divide(pairs)
    found = iter(torch.ops.gradcentral.center([tensor for tensor, _ in served], _encode(served)) if served else [])
    device = _device(pairs)
    return [next(found) if _is_served(tensor, device) else center(tensor, vectors) for tensor, vectors in pairs]


def traced_means(pairs: Sequence[Pair]) -> Means:
    """`Centering.means` in a graph."""
    served, rest = _divide(pairs)
    found = [torch.ops.gradcentral.means([tensor for tensor, _ in served], _encode(served))] if served else []
    return Means(found, [unit_means(tensor, vectors) for tensor, vectors in rest])


def restore_traced_(pairs: Sequence[Pair], means: Means) -> None:
    """`Centering.restore_` in a graph, of what `traced_means` has found."""
    served, rest = _divide(pairs)
    for flat in means.native:
        torch.ops.gradcentral.restore_([tensor for tensor, _ in served], flat, _encode(served))
    for (tensor, vectors), old in zip(rest, means.reference, strict=True):
        subtract_means_(tensor, unit_means(tensor, vectors) - old, vectors)


def _device(pairs: Sequence[Pair]) -> torch.device | None:
    """The device of the tensors that the operators take: one call, and one tensor of means, is for one device."""
    return next((tensor.device for tensor, _ in pairs if tensor.device.type in ("cpu", "cuda")), None)


def _is_served(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether the operators take it: means travel as real numbers in double."""
    return tensor.is_floating_point() and tensor.device == device


def _divide(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """What the operators take, and what is left to the reference path."""
    device = _device(pairs)
    return (
        [pair for pair in pairs if _is_served(pair[0], device)],
        [pair for pair in pairs if not _is_served(pair[0], device)],
    )


def _encode(pairs: Sequence[Pair]) -> list[int]:
    """The weight vectors of some tensors as the numbers that an operator can take."""
    numbers: list[int] = []
    for tensor, vectors in pairs:
        view = vectors.view if vectors.view is not None else tuple(tensor.shape)
        numbers += [len(view), *view, len(vectors.span), *vectors.span]
    return numbers


def _decode(numbers: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """View and span of each tensor."""
    rest = iter(numbers)
    for axes in rest:
        view = tuple(next(rest) for _ in range(axes))
        yield view, tuple(next(rest) for _ in range(next(rest)))


class _Site:
    """What an operator's call keeps for the next one with tensors of the same form."""

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        # Several threads may step models of one form, but a plan has one memory for its sums.
        self.lock = threading.Lock()
        self.centering = Centering()
        self.vectors = [
            WeightVectors(span, None if view == tuple(tensor.shape) else view)
            for tensor, (view, span) in zip(tensors, _decode(numbers), strict=True)
        ]
        self.means: Means | None = None


_sites: dict[Any, _Site] = {}


def _site(tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[_Site, list[Pair]]:
    form = (*numbers, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors))
    site = _sites.get(form)
    if site is None:
        site = _sites.setdefault(form, _Site(tensors, numbers))
    return site, [*zip(tensors, site.vectors, strict=True)]


def _center_(tensors: list[Tensor], vectors: list[int]) -> None:
    site, pairs = _site(tensors, vectors)
    with site.lock:
        if not site.centering.center_as_planned_(pairs):
            site.centering.center_(pairs)


def _center(tensors: list[Tensor], vectors: list[int]) -> list[Tensor]:
    copies = [tensor.clone() for tensor in tensors]
    _center_(copies, vectors)
    return copies


def _means(tensors: list[Tensor], vectors: list[int]) -> Tensor:
    site, pairs = _site(tensors, vectors)
    with site.lock:
        found = site.centering.means(pairs)
    site.means = Means(*([part.to("meta") for part in parts] for parts in found))
    return torch.cat([part.reshape(-1).double() for parts in found for part in parts])


def _restore_(tensors: list[Tensor], means: Tensor, vectors: list[int]) -> None:
    site, pairs = _site(tensors, vectors)
    if site.means is None:
        raise RuntimeError("gradcentral::restore_ gives back what gradcentral::means of the same tensors has found")
    pieces = iter(torch.split(means, [part.numel() for parts in site.means for part in parts]))
    old = Means(*([next(pieces).view(part.shape).to(part.dtype) for part in parts] for parts in site.means))
    with site.lock:
        site.centering.restore_(pairs, old)


def _fake_center_(tensors: list[Tensor], vectors: list[int]) -> None:
    return None


def _fake_center(tensors: list[Tensor], vectors: list[int]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _fake_means(tensors: list[Tensor], vectors: list[int]) -> Tensor:
    counts = [WeightVectors(span, view).count for view, span in _decode(vectors)]
    return tensors[0].new_empty(sum(counts), dtype=torch.float64)


def _fake_restore_(tensors: list[Tensor], means: Tensor, vectors: list[int]) -> None:
    return None


for _name, _real, _fake in (
    ("center_", _center_, _fake_center_),
    ("center", _center, _fake_center),
    ("means", _means, _fake_means),
    ("restore_", _restore_, _fake_restore_),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradcentral::{_name}", _fake, lib=_library)
