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

    Natively where it can be (dense CPU tensors of f32, f64 or bf16), by the reference path elsewhere; a plan is made
    anew whenever a tensor's shape, strides or type has changed.
    """

    def __init__(self) -> None:
        self._shares: list[_Share] = []
        self._rest: list[int] = []
        self._count = -1

    def center_as_planned_(self, pairs: Sequence[Pair]) -> bool:
        """Center every tensor in place if all of them are planned for the native kernels in just this form."""
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
            and not native.unavailable
            and all(share.plan.fits(*share.of(pairs)) for share in self._shares)
        )

    def _plan(self, pairs: Sequence[Pair]) -> list[_Share]:
        """What the native kernels serve, planned anew where it has changed; sets the rest."""
        if self._fits(pairs):
            return self._shares
        none = native.unavailable
        loops = [None if none else native.loop_of(tensor, vectors) for tensor, vectors in pairs]
        self._count = len(pairs)
        self._rest = [position for position, loop in enumerate(loops) if loop is None]
        self._shares = []
        for dtype in dict.fromkeys(tensor.dtype for tensor, _ in pairs):
            served = [(k, loop) for k, loop in enumerate(loops) if loop is not None and pairs[k][0].dtype == dtype]
            if served:
                positions = [k for k, _ in served]
                tensors, vectors = zip(*(pairs[k] for k in positions), strict=True)
                plan = native.CenteringPlan([*tensors], [*vectors], [loop for _, loop in served])
                self._shares.append(_Share(plan, positions))
        return self._shares
