"""Φ for many tensors at once: one interface, the reference path in torch and faster ones where they can serve.

``GRADCENTRAL_KERNELS=reference`` turns the native kernels off; ``GRADCENTRAL_KERNELS=native`` makes their absence an
error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gradcentral.kernels import native
from gradcentral.projection import center_, subtract_means_, unit_means
from gradcentral.vectors import WeightVectors

__all__ = ["Centering", "Pair", "available"]

Pair = tuple[Tensor, WeightVectors]

_CHOICES = ("", "reference", "native")


def available() -> dict[str, str]:
    """The kernels and, for each, why it can't be used; an empty string where it can.

    Examples:
        >>> from gradcentral import kernels
        >>> kernels.available()["reference"]
        ''
    """
    return {"reference": "", "native": native.unavailable}


def _check_choice() -> None:
    choice = os.environ.get("GRADCENTRAL_KERNELS", "")
    if choice not in _CHOICES:
        raise ImportError(f"GRADCENTRAL_KERNELS must be 'reference' or 'native' (or unset), not {choice!r}")
    if choice == "native" and native.unavailable:
        raise ImportError(f"GRADCENTRAL_KERNELS=native, but the native kernels can't be used: {native.unavailable}")


_check_choice()


class _Share(NamedTuple):
    """What one native plan serves: positions among the pairs, and their tensors."""

    plan: native.CenteringPlan
    positions: list[int]


class Means(NamedTuple):
    """Means of weight vectors, as `Centering.means` found them."""

    native: list[Tensor]
    reference: list[Tensor]


class Centering:
    """Centers many tensors, again and again: what can be planned is planned once.

    Natively where it can be (dense CPU tensors of f32, f64 or bf16), by the reference path elsewhere; a plan is made
    anew whenever a tensor's shape, strides or type has changed.
    """

    def __init__(self) -> None:
        self._shares: list[_Share] = []
        self._rest: list[int] = []
        self._vectors: list[WeightVectors] = []

    def center_(self, pairs: Sequence[Pair]) -> None:
        """Center every tensor in place."""
        for share, tensors in self._native(pairs):
            share.plan.center_(tensors)
        for position in self._rest:
            center_(*pairs[position])

    def means(self, pairs: Sequence[Pair]) -> Means:
        """The mean of every weight vector, to be given back by `restore_`."""
        found = [share.plan.means(tensors) for share, tensors in self._native(pairs)]
        return Means(found, [unit_means(*pairs[position]) for position in self._rest])

    def restore_(self, pairs: Sequence[Pair], means: Means) -> None:
        """Shift every weight vector so that it has its old mean again: w ← w_new − (mean(w_new) − mean(w_old))."""
        for (share, tensors), old in zip(self._native(pairs), means.native, strict=True):
            share.plan.restore_(tensors, old)
        for position, old in zip(self._rest, means.reference, strict=True):
            tensor, vectors = pairs[position]
            subtract_means_(tensor, unit_means(tensor, vectors) - old, vectors)

    def _native(self, pairs: Sequence[Pair]) -> list[tuple[_Share, list[Tensor]]]:
        """What the native kernels serve, planned anew where it has changed; sets the rest."""
        if native.unavailable:
            self._rest = list(range(len(pairs)))
            return []
        if not self._fits(pairs):
            self._plan(pairs)
        return [(share, [pairs[position][0] for position in share.positions]) for share in self._shares]

    def _fits(self, pairs: Sequence[Pair]) -> bool:
        return (
            len(pairs) == len(self._vectors)
            and not self._rest
            and all(
                share.plan.fits([pairs[k][0] for k in share.positions], [pairs[k][1] for k in share.positions])
                for share in self._shares
            )
        )

    def _plan(self, pairs: Sequence[Pair]) -> None:
        loops = [native.loop_of(tensor, vectors) for tensor, vectors in pairs]
        self._vectors = [vectors for _, vectors in pairs]
        self._rest = [position for position, loop in enumerate(loops) if loop is None]
        self._shares = []
        for dtype in dict.fromkeys(tensor.dtype for tensor, _ in pairs):
            positions = [k for k, loop in enumerate(loops) if loop is not None and pairs[k][0].dtype == dtype]
            if positions:
                plan = native.CenteringPlan(
                    [pairs[k][0] for k in positions],
                    [pairs[k][1] for k in positions],
                    [loop for k in positions if (loop := loops[k]) is not None],
                )
                self._shares.append(_Share(plan, positions))
