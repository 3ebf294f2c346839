"""Gradients as matrices whose rows are weight vectors."""

from __future__ import annotations

import torch
from hypothesis import given

from gradcentral.paper.gradients import as_rows
from gradcentral.projection import center, unit_means
from tests.strategies import Case, cases


@given(case=cases((torch.float64,)))
def test_each_row_is_a_weight_vector_in_the_order_of_the_units(case: Case) -> None:
    rows = as_rows(case.tensor, case.vectors)
    fitted = case.vectors.for_shape(case.tensor.shape)
    assert rows.shape == (fitted.count, fitted.fan_in)
    torch.testing.assert_close(rows.mean(1), unit_means(case.tensor, case.vectors).flatten())
    centered = as_rows(center(case.tensor, case.vectors), case.vectors)
    torch.testing.assert_close(centered, rows - rows.mean(1, keepdim=True))
