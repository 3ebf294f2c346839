"""Centering under ``torch.compile``: custom operators, so that centering all tensors is one node of the graph.

The compiler sees the operators and their fake implementations (shapes only). The operators run `Centering`, with
kernels where possible. Tensors that the operators do not accept are centered by the reference path and traced like any
other code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels.centering import Centering, Means
from gradcentral.projection import Pair, Strength, center_, center_regularized, restore_means_, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["TracedCentering"]

_library: Any = torch.library.Library("gradcentral", "DEF")  # type: ignore[no-untyped-call]
# For each tensor, `vectors` holds the number of axes of its view, the view, the number of spanned axes, and those axes.
_library.define("means(Tensor[] tensors, int[] vectors) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
# Without means, each weight vector is shifted to mean zero, which is Φ.
_library.define(
    "restore_means_(Tensor(a!)[] tensors, Tensor? means, int[] vectors, Tensor? strength=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "center_regularized_(Tensor(a!)[] gradients, Tensor[] weights, float[] l2, Tensor? scale, int[] vectors,"
    " Tensor? strength=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


class TracedCentering:
    """The interface of `Centering` while ``torch.compile`` traces: each method puts one operator into the graph."""

    def center_all_(self, pairs: Sequence[Pair], strength: Strength = 1.0) -> None:
        """Center every tensor in place."""
        served, rest = _served_and_rest(pairs)
        if served:
            torch.ops.gradcentral.restore_means_(
                [tensor for tensor, _ in served], None, _encode(served), _on_graph(strength)
            )
        for tensor, vectors in rest:
            center_(tensor, vectors, strength)

    def center_regularized_(
        self,
        gradients: Sequence[Pair],
        weights: Sequence[Tensor],
        l2: Sequence[float],
        scale: Tensor | None = None,
        strength: Strength = 1.0,
    ) -> None:
        """Replace every gradient in place by `center_regularized` of it, its weights and λ · scale."""
        takes = _are_served(gradients)
        served = [pair for pair, taken in zip(gradients, takes, strict=True) if taken]
        if served:
            torch.ops.gradcentral.center_regularized_(
                [gradient for gradient, _ in served],
                [w for w, taken in zip(weights, takes, strict=True) if taken],
                [factor for factor, taken in zip(l2, takes, strict=True) if taken],
                scale,
                _encode(served),
                _on_graph(strength),
            )
        for (gradient, vectors), w, factor, taken in zip(gradients, weights, l2, takes, strict=True):
            if not taken:
                of_weights = factor if scale is None or factor == 0 else scale * factor
                gradient.copy_(center_regularized(gradient, w, of_weights, vectors, strength))

    def means(self, pairs: Sequence[Pair]) -> Means:
        """Return the mean of every weight vector, to be passed to `restore_`."""
        served, rest = _served_and_rest(pairs)
        planned = [torch.ops.gradcentral.means([tensor for tensor, _ in served], _encode(served))] if served else []
        return Means(planned, [unit_means(tensor, vectors) for tensor, vectors in rest])

    def restore_(self, pairs: Sequence[Pair], means: Means, strength: Strength = 1.0) -> None:
        """Apply `restore_means_` to every tensor."""
        served, rest = _served_and_rest(pairs)
        for flat in means.planned:
            torch.ops.gradcentral.restore_means_(
                [tensor for tensor, _ in served], flat, _encode(served), _on_graph(strength)
            )
        for (tensor, vectors), old in zip(rest, means.reference, strict=True):
            restore_means_(tensor, old, vectors, strength)


def _on_graph(strength: Strength) -> Tensor | None:
    if isinstance(strength, Tensor):
        return strength
    return None if strength == 1 else torch.tensor(strength, dtype=torch.float64, device="cpu")


def _are_served(pairs: Sequence[Pair]) -> list[bool]:
    # One call returns one tensor of means on one device; means are passed as real numbers in float64.
    # Dynamo of torch 2.8 does not trace next() with a default.
    devices = [tensor.device for tensor, _ in pairs if tensor.device.type in ("cpu", "cuda")]
    return [tensor.is_floating_point() and tensor.device in devices[:1] for tensor, _ in pairs]


def _served_and_rest(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    takes = _are_served(pairs)
    served = [pair for pair, taken in zip(pairs, takes, strict=True) if taken]
    return served, [pair for pair, taken in zip(pairs, takes, strict=True) if not taken]


def _encode(pairs: Sequence[Pair]) -> list[int]:
    """Encode the weight vectors of some tensors as integers, which an operator accepts as an argument."""
    numbers: list[int] = []
    for tensor, vectors in pairs:
        view = vectors.view if vectors.view is not None else tuple(tensor.shape)
        numbers += [len(view), *view, len(vectors.span), *vectors.span]
    return numbers


def _decode(numbers: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the view and span of each tensor from the output of `_encode`."""
    rest = iter(numbers)
    for axes in rest:
        view = tuple(next(rest) for _ in range(axes))
        yield view, tuple(next(rest) for _ in range(next(rest)))


class _CachedCentering:
    """Plans for operator calls with tensors of one form."""

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        # Several threads may train models of the same form, but a plan has only one scratch buffer for its sums.
        self.lock = threading.Lock()
        self.centering = Centering()
        self.vectors = [
            WeightVectors(span, None if view == tuple(tensor.shape) else view)
            for tensor, (view, span) in zip(tensors, _decode(numbers), strict=True)
        ]
        self.form_of_means: Means | None = None


_cache: dict[Any, _CachedCentering] = {}


def _cached(tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[_CachedCentering, list[Pair]]:
    form = (*numbers, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors))
    found = _cache.get(form)
    if found is None:
        found = _cache.setdefault(form, _CachedCentering(tensors, numbers))
    return found, [*zip(tensors, found.vectors, strict=True)]


def _means(tensors: list[Tensor], vectors: list[int]) -> Tensor:
    cached, pairs = _cached(tensors, vectors)
    with cached.lock:
        found = cached.centering.means(pairs)
    cached.form_of_means = Means(*([part.to("meta") for part in parts] for parts in found))
    return torch.cat([part.reshape(-1).double() for parts in found for part in parts])


def _restore_means_(
    tensors: list[Tensor], means: Tensor | None, vectors: list[int], strength: Tensor | None = None
) -> None:
    part = 1.0 if strength is None else strength
    cached, pairs = _cached(tensors, vectors)
    if means is None:
        with cached.lock:
            cached.centering.center_all_(pairs, part)
        return
    form = cached.form_of_means
    if form is None:
        raise RuntimeError("gradcentral::restore_means_ needs the result of gradcentral::means for the same tensors")
    pieces = iter(torch.split(means, [part.numel() for parts in form for part in parts]))
    old = Means(*([next(pieces).view(part.shape).to(part.dtype) for part in parts] for parts in form))
    with cached.lock:
        cached.centering.restore_(pairs, old, part)


def _center_regularized_(
    gradients: list[Tensor],
    weights: list[Tensor],
    l2: list[float],
    scale: Tensor | None,
    vectors: list[int],
    strength: Tensor | None = None,
) -> None:
    cached, pairs = _cached(gradients, vectors)
    with cached.lock:
        cached.centering.center_regularized_(pairs, weights, l2, scale, 1.0 if strength is None else strength)


def _fake_means(tensors: list[Tensor], vectors: list[int]) -> Tensor:
    counts = [WeightVectors(span, view).count for view, span in _decode(vectors)]
    return tensors[0].new_empty(sum(counts), dtype=torch.float64)


def _fake_restore_means_(
    tensors: list[Tensor], means: Tensor | None, vectors: list[int], strength: Tensor | None = None
) -> None:
    return None


def _fake_center_regularized_(
    gradients: list[Tensor],
    weights: list[Tensor],
    l2: list[float],
    scale: Tensor | None,
    vectors: list[int],
    strength: Tensor | None = None,
) -> None:
    return None


for _name, _real, _fake in (
    ("means", _means, _fake_means),
    ("restore_means_", _restore_means_, _fake_restore_means_),
    ("center_regularized_", _center_regularized_, _fake_center_regularized_),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradcentral::{_name}", _fake, lib=_library)
