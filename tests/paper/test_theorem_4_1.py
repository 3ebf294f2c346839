"""Theorem 4.1 and the hyperplane constraint hold under the paper's conditions, and violations are detected."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightVectors, weight_layout
from gradcentral.paper import hyperplane, intensity_responses, intensity_shift
from tests.paper.networks import batch, mse, network


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> nn.Module:
    input, target = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(input), target).backward()
        optimizer.step()
    return model


SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), **SGD), False),
        (lambda m: gradcentral.SGD(m, **SGD), True),
        (lambda m: gradcentral.SGD(m, **SGD, weight_decay=0.01), False),
        (lambda m: gradcentral.SGD(m, **SGD, weight_decay=0.01, placement="update"), True),
        (lambda m: gradcentral.AdamW(m, lr=0.01), False),
        (lambda m: gradcentral.AdamW(m, lr=0.01, placement="update"), True),
    ],
)
def test_training_stays_on_the_hyperplane_where_it_should(
    make: Callable[[nn.Module], torch.optim.Optimizer], stays: bool
) -> None:
    model = network()
    before = copy.deepcopy(model)
    train(model, make(model))
    on_plane = hyperplane(model, before, steps=10)
    shifted = intensity_shift(model, before, batch(), steps=10, gamma=0.5)
    assert on_plane.holds == shifted.holds == stays
    if not stays:
        assert on_plane.value > 5 * on_plane.bound


def test_hyperplane_is_the_sum_of_the_change_over_root_M() -> None:
    model = nn.Linear(4, 2).double()
    nn.init.ones_(model.weight)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[1] += torch.tensor([1.0, -1.0, 3.0, 1.0])
    found = hyperplane(model, before, steps=1)
    assert found.value == pytest.approx(4 / 2 / math.sqrt(2**2 + 0 + 4**2 + 2**2))
    assert found.where == "weight, unit 1"


def test_the_hyperplane_does_not_hold_for_a_diverged_model() -> None:
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[1, 2] = math.nan
    found = hyperplane(model, before, steps=1)
    assert math.isnan(found.value)
    assert not found.holds


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 5, padding=2, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 6, 1),
    ],
)
def test_every_unpadded_pixel_of_a_convolution_responds_as_its_initial_weights_predict(layer: nn.Conv2d) -> None:
    model = layer
    before = copy.deepcopy(layer)
    optimizer = gradcentral.SGD(model, lr=0.1)
    x = torch.rand(3, 4, 9, 9)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().sum() / 100).backward()
        optimizer.step()
    (response,) = intensity_responses(model, before, (x, None), gamma=-0.7)
    # The same for one pixel in the middle, computed by hand.
    middle = (0, slice(None), model(x).shape[2] // 2, model(x).shape[3] // 2)
    by_hand = (model(x - 0.7) - model(x)).detach()[middle].double()
    predicted = -0.7 * before.weight.detach().double().sum((1, 2, 3))
    assert not torch.allclose(model.weight, before.weight, atol=1e-3)
    torch.testing.assert_close(response.predicted, predicted)
    torch.testing.assert_close(by_hand, predicted, rtol=0, atol=1e-5)
    torch.testing.assert_close(response.measured, by_hand, rtol=0, atol=1e-5)
    assert float(response.error.max()) < 1e-5


@pytest.mark.parametrize("centered", [True, False])
def test_linear_units_respond_as_their_initial_weights_predict_only_with_gc(centered: bool) -> None:
    layer = nn.Linear(6, 3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))
    before, initial = copy.deepcopy(model), layer.weight.detach().double()
    optimizer = gradcentral.SGD(model, lr=0.2) if centered else torch.optim.SGD(model.parameters(), lr=0.2)
    x, y = torch.rand(16, 5, 6), torch.randn(16, 5, 2)
    for _ in range(10):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    first, second = intensity_responses(model, before, (x, None), gamma=2.0)
    assert (first.name, second.name) == ("0.weight", "2.weight")
    by_hand = (layer(x + 2) - layer(x)).detach()[0, 0].double()
    torch.testing.assert_close(first.measured, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.predicted, 2 * initial.sum(1))
    assert bool((first.error < 1e-5).all()) == bool((second.error < 1e-5).all()) == centered


def test_training_with_a_wrong_axis_violates_theorem_4_1() -> None:
    model = nn.Linear(6, 6)
    before = copy.deepcopy(model)
    wrong = weight_layout(model, overrides={"weight": WeightVectors((0,))})
    optimizer = gradcentral.SGD(model.parameters(), lr=0.2, layout=wrong)
    x = torch.rand(16, 6)
    mse(model(x), torch.randn(16, 6)).backward()
    optimizer.step()
    assert not intensity_shift(model, before, (x, None), steps=1).holds
    assert hyperplane(model, before, steps=1, layout=wrong).holds


def test_layers_whose_output_is_not_a_plain_product_are_skipped() -> None:
    class Standardized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight / self.weight.std(), self.bias)

    own = Standardized(4, 4)
    model = nn.Sequential(own, nn.Linear(4, 3))
    (response,) = intensity_responses(model, copy.deepcopy(model), (torch.rand(2, 4), None))
    assert response.name == "1.weight"
    with pytest.raises(ValueError, match="no centered Linear or convolution"):
        intensity_responses(own, own, (torch.rand(2, 4), None))
    padded = nn.Conv2d(2, 3, 3, padding=1)
    with pytest.raises(ValueError, match="that no padding touches"):
        intensity_responses(padded, padded, (torch.rand(1, 2, 2, 2), None))


def test_bad_arguments_are_refused_by_name() -> None:
    model, data = network(), batch()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        hyperplane(model, model, steps=0)
    with pytest.raises(ValueError, match="gamma must not be 0"):
        intensity_shift(model, model, data, steps=1, gamma=0)


def test_the_initial_model_must_be_a_copy_and_the_suggested_one_works() -> None:
    model, data = network(), batch()
    with pytest.raises(ValueError, match=r"before: no 0\.weight of shape \(4, 2, 3, 3\)"):
        intensity_shift(model, nn.Linear(2, 3), data, steps=1)
    with pytest.raises(ValueError, match=r"before: no 0\.weight of shape \(4, 2, 3, 3\)") as caught:
        hyperplane(model, nn.Linear(2, 3), steps=1)
    suggested = re.search(r"give (\S+),", str(caught.value))
    assert suggested is not None
    assert hyperplane(model, eval(suggested[1], {"copy": copy, "model": model}), steps=1).holds
