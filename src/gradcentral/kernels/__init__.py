"""Φ for many tensors at once: one interface, the reference path in torch and faster ones where they can serve.

CPU tensors are for the native kernels, CUDA tensors for those in Triton. ``GRADCENTRAL_KERNELS=reference`` turns both
off; ``native`` or ``triton`` makes the absence of those kernels an error. With ``triton`` and ``TRITON_INTERPRET=1``,
Triton's interpreter serves CPU tensors: a way to test without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from gradcentral.kernels import native, triton
from gradcentral.kernels.loops import Loop
from gradcentral.projection import Pair, center_, subtract_means_, unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Centering", "Means", "available", "kernels_for"]

_CHOICES = ("", "reference", "native", "triton")


def available() -> dict[str, str]:
    """The kernels and, for each, why it can't be used; an empty string where it can.

    Examples:
        >>> from gradcentral import kernels
        >>> kernels.available()["reference"]
        ''
    """
    return {"reference": "", "native": native.unavailable_reason(), "triton": triton.unavailable_reason()}


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module whose kernels are for tensors on this one's device; None for the reference path."""
    if triton.serves(tensor):
        return triton
    return native if native.serves(tensor) else None


def _check_choice() -> None:
    choice = os.environ.get("GRADCENTRAL_KERNELS", "")
    if choice not in _CHOICES:
        raise ImportError(f"GRADCENTRAL_KERNELS must be 'reference', 'native' or 'triton' (or unset), not {choice!r}")
    if choice in ("native", "triton") and (why_not := available()[choice]):
        raise ImportError(f"GRADCENTRAL_KERNELS={choice}, but the {choice} kernels can't be used: {why_not}")


_check_choice()


class _Share(NamedTuple):
    """What one plan serves: positions among the pairs, and their tensors."""

    plan: Any
    """A CenteringPlan, native or in Triton."""
    positions: list[int]

    def of(self, pairs: Sequence[Pair]) -> tuple[list[Tensor], list[WeightVectors]]:
        """Its own among the pairs."""
        mine = pairs if len(self.positions) == len(pairs) else [pairs[k] for k in self.positions]
        return [tensor for tensor, _ in mine], [vectors for _, vectors in mine]


class Means(NamedTuple):
    """Means of weight vectors, as `Centering.means` found them."""

    native: list[Tensor]
    reference: list[Tensor]


class Centering:
    """Centers many tensors, again and again: what can be planned is planned once.

    Natively where it can be (dense CPU tensors of f32, f64 or bf16), in Triton (dense CUDA tensors of f32, bf16 or
    f16), by the reference path elsewhere; a plan is made anew whenever a tensor's shape, strides or type has changed.
    """

    def __init__(self) -> None:
        self._shares: list[_Share] = []
        self._rest: list[int] = []
        self._count = -1

    def center_as_planned_(self, pairs: Sequence[Pair]) -> bool:
        """Center every tensor in place if all of them are planned in just this form."""
        if not self._fits(pairs):
            return False
        for share in self._shares:
            share.plan.center_(share.of(pairs)[0])
        return True

    def center_(self, pairs: Sequence[Pair]) -> None:
        """Center every tensor in place."""
        for share in self._plan(pairs):
            share.plan.center_(share.of(pairs)[0])
        for position in self._rest:
            center_(*pairs[position])

    def means(self, pairs: Sequence[Pair]) -> Means:
        """The mean of every weight vector, to be given back by `restore_`."""
        found = [share.plan.means(share.of(pairs)[0]) for share in self._plan(pairs)]
        return Means(found, [unit_means(*pairs[position]) for position in self._rest])

    def restore_(self, pairs: Sequence[Pair], means: Means) -> None:
        """Shift every weight vector so that it has its old mean again: w ← w_new − (mean(w_new) − mean(w_old))."""
        for share, old in zip(self._plan(pairs), means.native, strict=True):
            share.plan.restore_(share.of(pairs)[0], old)
        for position, old in zip(self._rest, means.reference, strict=True):
            tensor, vectors = pairs[position]
            subtract_means_(tensor, unit_means(tensor, vectors) - old, vectors)

    def _fits(self, pairs: Sequence[Pair]) -> bool:
        return (
            len(pairs) == self._count
            and not self._rest
            and (not pairs or kernels_for(pairs[0][0]) is not None)
            and all(share.plan.fits(*share.of(pairs)) for share in self._shares)
        )

    def _plan(self, pairs: Sequence[Pair]) -> list[_Share]:
        """What the kernels serve, planned anew where it has changed; sets the rest."""
        if self._fits(pairs):
            return self._shares
        served: dict[Any, list[tuple[int, Loop]]] = {}
        self._count, self._rest, self._shares = len(pairs), [], []
        for position, (tensor, vectors) in enumerate(pairs):
            kernels = kernels_for(tensor)
            loop = None if kernels is None else kernels.loop_of(tensor, vectors)
            if loop is None:
                self._rest.append(position)
            else:
                served.setdefault((kernels, tensor.device, tensor.dtype), []).append((position, loop))
        for (kernels, _, _), found in served.items():
            positions = [position for position, _ in found]
            mine = [pairs[position] for position in positions]
            plan = kernels.CenteringPlan([t for t, _ in mine], [v for _, v in mine], [loop for _, loop in found])
            self._shares.append(_Share(plan, positions))
        return self._shares
