"""A measurement holds up to its bound, and the unit with the largest number is named."""

from __future__ import annotations

import math

import torch

from gradcentral.paper.measurement import Measurement, largest


def test_a_measurement_holds_up_to_its_bound_and_not_for_nan() -> None:
    def measured(value: float) -> Measurement:
        return Measurement("eq. 1", "", "", value, 1.0, "")

    assert [measured(value).holds for value in (0.5, 1.0, 1.1, math.nan)] == [True, True, False, False]


def test_largest_names_the_unit_and_counts_nan_as_the_largest() -> None:
    assert largest({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])}) == (3.0, "a, unit 1")
    value, where = largest({"a": torch.tensor([1.0]), "b": torch.tensor([0.0, math.nan]), "c": torch.tensor([9.0])})
    assert math.isnan(value)
    assert where == "b, unit 1"
