"""`center_weights_`: centering the initial weights of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradcentral
from gradcentral import WeightVectors, weight_layout
from gradcentral.initialization import center_weights_
from gradcentral.paper import intensity_responses


def test_center_weights_subtracts_the_mean_of_each_weight_vector_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 3), nn.Embedding(3, 4), nn.Linear(6, 2)).double()
    before = copy.deepcopy(model)
    layout = center_weights_(model)
    assert [layout.names[p] for p in layout] == ["0.weight", "1.weight", "3.weight"]
    for name, spanned in (("0.weight", (1, 2, 3)), ("1.weight", (0, 2, 3)), ("3.weight", (1,))):
        w, was = model.get_parameter(name).detach(), before.get_parameter(name)
        torch.testing.assert_close(w, was - was.mean(spanned, keepdim=True))
        assert float(w.mean(spanned).abs().max()) < 1e-16
    for name in ("0.bias", "2.weight", "3.bias"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_center_weights_uses_the_given_layout() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 4)
    model = nn.Sequential(first, second)
    before = second.weight.detach().clone()
    layout = weight_layout(model, overrides={"0.weight": WeightVectors((0,))}, exclude=["1.weight"])
    assert center_weights_(model, layout) is layout
    assert float(first.weight.detach().mean(0).abs().max()) < 1e-7
    assert float(first.weight.detach().mean(1).abs().max()) > 1e-3
    assert torch.equal(second.weight, before)


def test_centered_weights_and_gc_make_a_network_invariant_to_intensity() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    center_weights_(model)
    before = copy.deepcopy(model)
    optimizer = gradcentral.SGD(model, lr=0.05, momentum=0.9, weight_decay=1e-2, placement="update")
    x, y = torch.rand(8, 2, 6, 6), torch.randint(3, (8,))
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for response in intensity_responses(model, before, (x, None), gamma=3.0):
        assert float(response.measured.abs().max()) < 1e-5 * float(response.scale.min())
    torch.testing.assert_close(model(x + 3.0), model(x), rtol=0, atol=1e-4)


def test_center_weights_raises_without_weights_to_center() -> None:
    with pytest.raises(ValueError, match="nothing to center"):
        center_weights_(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="weight is not a parameter of the model"):
        center_weights_(nn.Linear(3, 2), weight_layout(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="run one forward"):
        center_weights_(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
