"""A statement, the number measured for it, and the bound that the number must meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LeftOut", "Measured", "NotMeasurableError", "Statements", "worst"]


class NotMeasurableError(ValueError):
    """The network has nothing that a statement speaks of. It says nothing about other statements."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one statement. It holds where ``value <= bound``.

    An equation is measured by how far its sides are apart, which rounding alone may explain.

    Args:
        source: where the paper (Yong et al. 2020) says it.
        statement: in words.
        formula: of ``value``, in the paper's symbols.
        value: the largest number found.
        bound: what it must not exceed.
        allowance: how the bound is made up, rounding included.
        where: the weight vector of the largest number, or how it was computed.
        without: the same number after the same training without GC, where there is one.

    Attributes:
        holds: whether ``value <= bound``; False for NaN.

    Examples:
        >>> Measured("eq. 2", "Φ(g) has mean zero", "|eᵀΦ(g)| / ‖g‖", 3e-8, 4.8e-7, "4 eps(float32)").holds
        True
    """

    source: str
    statement: str
    formula: str
    value: float
    bound: float
    allowance: str
    where: str = ""
    without: float | None = None
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "holds", self.value <= self.bound)


class LeftOut(NamedTuple):
    """A statement that was not measured.

    Attributes:
        source, statement: as those of a `Measured`.
        reason: why not.
    """

    source: str
    statement: str
    reason: str


class Statements(list[Measured]):
    """The statements that were measured, and those that could not be.

    Args:
        measured: the items of this list.
        left_out: the others.

    Examples:
        >>> Statements([], [LeftOut("theorem 4.1", "outputs change by γ1ᵀw⁰", "there is no Linear")]).left_out
        (LeftOut(source='theorem 4.1', statement='outputs change by γ1ᵀw⁰', reason='there is no Linear'),)
    """

    def __init__(self, measured: Iterable[Measured] = (), left_out: Sequence[LeftOut] = ()) -> None:
        super().__init__(measured)
        self.left_out = tuple(left_out)


def worst(numbers: Iterable[tuple[str, Tensor]]) -> tuple[float, str]:
    """The largest of all numbers, and which one it is; a NaN counts as the largest.

    Args:
        numbers: (name, one number per output unit) of each parameter.

    Raises:
        ValueError: there is no number.

    Examples:
        >>> import torch
        >>> worst([("a", torch.tensor([1.0, 4.0])), ("b", torch.tensor([2.0]))])
        (4.0, 'a, unit 1')
    """
    largest, where = -math.inf, ""
    for name, values in numbers:
        unit = int(torch.argmax(values))  # of a NaN, if there is one
        value = float(values[unit])
        if math.isnan(value):
            return value, f"{name}, unit {unit}"
        if value > largest:
            largest, where = value, f"{name}, unit {unit}"
    if not where:
        raise ValueError("there is nothing to measure")
    return largest, where
