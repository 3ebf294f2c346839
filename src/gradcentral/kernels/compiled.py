"""Centering under ``torch.compile``: custom operators, so that centering all tensors is one node of the graph.

The compiler sees the operators and their fake implementations (shapes only). The operators run `Centering`, with
kernels where possible. Tensors that the operators do not accept are centered by the reference path and traced like any
other code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from gradcentral.kernels.centering import Centering, Means
from gradcentral.projection import (
    Pair,
    Strength,
    center_,
    center_regularized,
    checked_strength,
    restore_means_,
    unit_means,
)
from gradcentral.weight_vectors import WeightVectors

__all__ = ["TracedCentering", "decode", "encode", "on_graph", "register"]

_library: Any = torch.library.Library("gradcentral", "DEF")  # type: ignore[no-untyped-call]


def _no_result(*args: object) -> None:
    """Stand in for an operator that only writes to its arguments, while the compiler traces."""


def register(function: Callable[..., Any], writes: Sequence[str] = (), fake: Callable[..., Any] = _no_result) -> None:
    """Register a function as an operator of the same name, without the leading underscore.

    Args:
        function: its annotations give the signature.
        writes: the parameters that it writes to.
        fake: what the compiler calls in its place, with tensors that have shapes but no values.
    """
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=writes, op_name=name)
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    # Where torch 2.8 breaks the graph, Dynamo would otherwise trace the function itself.
    _library.impl(name, _disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradcentral::{name}", fake, lib=_library)


def encode(vectors: Iterable[WeightVectors | None]) -> str:
    """Return the weight vectors of some tensors as text, which an operator accepts as an argument.

    Examples:
        >>> encode([WeightVectors((1,)), None, WeightVectors((1, 3), view=(2, 4, 3, 5))])
        '1;;1,3@2,4,3,5'
    """
    texts = []
    for each in vectors:
        text = "" if each is None else ",".join(map(str, each.span))
        texts.append(text if each is None or each.view is None else f"{text}@{','.join(map(str, each.view))}")
    return ";".join(texts)


@lru_cache(maxsize=64)
def decode(text: str) -> list[WeightVectors | None]:
    """Return the weight vectors from the output of `encode`; None for a tensor that is not centered."""
    found: list[WeightVectors | None] = []
    for part in text.split(";"):
        span, _, view = part.partition("@")
        axes = tuple(map(int, span.split(","))) if span else ()
        found.append(WeightVectors(axes, tuple(map(int, view.split(","))) if view else None) if span else None)
    return found


def on_graph(number: float) -> Tensor:
    """Return a number as a tensor that ``torch.compile`` computes, so that a new value needs no compilation.

    Inductor turns a Python number into an input of the graph if it finds it in arithmetic with a tensor, and into a
    constant of the graph otherwise. Dynamo itself treats a number as a constant until it has seen a second value.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * number


class TracedCentering:
    """The interface of `Centering` while ``torch.compile`` traces: each method puts one operator into the graph."""

    def center_all_(self, pairs: Sequence[Pair], strength: Strength = 1.0) -> None:
        """Center every tensor in place."""
        served, rest = _served_and_rest(pairs)
        if served:
            torch.ops.gradcentral.restore_means_(
                [tensor for tensor, _ in served], None, _encode(served), _strength(strength)
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
                _strength(strength),
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
                [tensor for tensor, _ in served], flat, _encode(served), _strength(strength)
            )
        for (tensor, vectors), old in zip(rest, means.reference, strict=True):
            restore_means_(tensor, old, vectors, strength)


def _strength(strength: Strength) -> Tensor | None:
    if isinstance(strength, Tensor):
        return strength
    return None if strength == 1 else on_graph(strength)


def _are_served(pairs: Sequence[Pair]) -> list[bool]:
    # One call returns one tensor of means on one device; means are passed as real numbers in float64.
    # Dynamo of torch 2.8 does not trace next() with a default.
    devices = [tensor.device for tensor, _ in pairs if tensor.device.type in ("cpu", "cuda")]
    return [tensor.is_floating_point() and tensor.device in devices[:1] for tensor, _ in pairs]


def _served_and_rest(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    takes = _are_served(pairs)
    served = [pair for pair, taken in zip(pairs, takes, strict=True) if taken]
    return served, [pair for pair, taken in zip(pairs, takes, strict=True) if not taken]


def _encode(pairs: Sequence[Pair]) -> str:
    return encode(vectors for _, vectors in pairs)


class _CachedCentering:
    """Plans for operator calls with tensors of one form."""

    def __init__(self, vectors: str) -> None:
        # Several threads may train models of the same form, but a plan has only one scratch buffer for its sums.
        self.lock = threading.Lock()
        self.centering = Centering()
        self.vectors = [each for each in decode(vectors) if each is not None]
        self.form_of_means: Means | None = None


_cache: dict[Any, _CachedCentering] = {}


def _cached(tensors: Sequence[Tensor], vectors: str) -> tuple[_CachedCentering, list[Pair]]:
    form = (vectors, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors))
    found = _cache.get(form)
    if found is None:
        found = _cache.setdefault(form, _CachedCentering(vectors))
    return found, [*zip(tensors, found.vectors, strict=True)]


def _means(tensors: list[Tensor], vectors: str) -> Tensor:
    cached, pairs = _cached(tensors, vectors)
    with cached.lock:
        found = cached.centering.means(pairs)
    cached.form_of_means = Means(*([part.to("meta") for part in parts] for parts in found))
    return torch.cat([part.reshape(-1).double() for parts in found for part in parts])


def _fake_means(tensors: list[Tensor], vectors: str) -> Tensor:
    pairs = zip(tensors, decode(vectors), strict=True)
    counts = [each.for_shape(tensor.shape).count for tensor, each in pairs if each is not None]
    return tensors[0].new_empty(sum(counts), dtype=torch.float64)


def _restore_means_(tensors: list[Tensor], means: Tensor | None, vectors: str, strength: Tensor | None = None) -> None:
    """Restore means; without any, shift each weight vector to mean zero, which is Φ."""
    part = checked_strength(1.0 if strength is None else strength)
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
    vectors: str,
    strength: Tensor | None = None,
) -> None:
    cached, pairs = _cached(gradients, vectors)
    with cached.lock:
        cached.centering.center_regularized_(
            pairs, weights, l2, scale, checked_strength(1.0 if strength is None else strength)
        )


register(_means, fake=_fake_means)
register(_restore_means_, writes=["tensors"])
register(_center_regularized_, writes=["gradients"])
