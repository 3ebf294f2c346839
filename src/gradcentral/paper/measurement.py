"""The number measured for a statement of the paper, and the bound that it must not exceed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["CENTERING", "Measurement", "NotMeasurableError", "coarsest_eps", "measure_largest", "relative"]

_PerUnit: TypeAlias = dict[str, Tensor]  # one number per output unit, by the name of the parameter
CENTERING = 4
"""Rounding error of Φ, in eps of ‖g‖: that of a mean, slightly more accurate than eps, and that of the difference."""


class NotMeasurableError(ValueError):
    """The network has no layer to which a statement applies; other statements can still be measured."""


class Measurement(NamedTuple):
    """The number measured for one statement of the paper.

    An equation is measured by the difference between its sides, which must not exceed the rounding error.

    Attributes:
        source: the equation, theorem or section of Yong et al. 2020.
        statement, formula: the statement in words, and the formula of ``value`` in the paper's symbols.
        value, bound: the largest number found, and the largest for which the statement holds.
        allowance: the computation of the bound, including rounding errors.
        where: the weight vector of the largest number, or the method of computation.
        without: the same number after the same training without GC, if the statement is about training.
    """

    source: str
    statement: str
    formula: str
    value: float
    bound: float
    allowance: str
    where: str = ""
    without: float | None = None

    @property
    def holds(self) -> bool:
        """Whether ``value <= bound``; False for NaN."""
        return self.value <= self.bound


def measure_largest(
    source: str, statement: str, formula: str, values: _PerUnit, factor: int, like: Iterable[Tensor], limit: int = 0
) -> Measurement:
    """Measure the largest value, with a bound of the limit plus ``factor`` eps of the coarsest dtype of ``like``."""
    value, where = largest(values)
    eps, dtype = coarsest_eps(like)
    allowance = f"{limit} + " * (limit != 0) + f"{factor} eps({dtype})"
    return Measurement(source, statement, formula, value, limit + factor * eps, allowance, where)


def largest(values: _PerUnit) -> tuple[float, str]:
    """Return the largest value and the name of its unit; NaN counts as the largest."""
    found = {}
    for name, numbers in values.items():
        unit = int(numbers.argmax())  # the position of a NaN, if there is one
        found[f"{name}, unit {unit}"] = float(numbers[unit])
    where = max(found, key=lambda unit: (math.isnan(found[unit]), found[unit]))
    return found[where], where


def coarsest_eps(parameters: Iterable[Tensor]) -> tuple[float, str]:
    """Return the largest eps among the dtypes of the parameters, and the name of that dtype."""
    dtype = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.finfo(dtype).eps, str(dtype).removeprefix("torch.")


def relative(lengths: Tensor, scale: Tensor) -> Tensor:
    """Divide lengths by a scale; where the scale is 0 (a dead unit), return the length itself."""
    return lengths / torch.where(scale > 0, scale, 1)
