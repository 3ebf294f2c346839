"""`centralize_gradients`: centering in a hand-written loop."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import WeightVectors, attached, center, centralize_gradients, weight_layout

ROWS = WeightVectors((1,))


def _model() -> Any:  # nn.Sequential: its layers have no typed `weight`
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    x = torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10
    torch.autograd.backward((model(x) - 1).square().mean())


def test_centralize_gradients_in_a_hand_written_loop() -> None:
    model = _model()
    _backward(model)
    expected = [center(p.grad, ROWS) for p in model.parameters() if p.ndim == 2 and p.grad is not None]
    centralize_gradients(model)
    found = [p.grad for p in model.parameters() if p.ndim == 2]
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-15)
    model.append(nn.Linear(3, 2).double())
    _backward(model)
    centralize_gradients(model)
    assert model[3].weight.grad is not None
    assert model[3].weight.grad.mean(1).abs().max() < 1e-15


def test_centralize_gradients_keeps_no_model_alive() -> None:
    model = _model()
    _backward(model)
    centralize_gradients(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_centralize_gradients_with_a_layout() -> None:
    model = _model()
    _backward(model)
    raw = model[2].weight.grad
    assert raw is not None
    raw = raw.clone()
    centralize_gradients(layout=weight_layout(model, exclude=["2.*"]))
    assert torch.equal(model[2].weight.grad, raw)
    assert model[0].weight.grad.mean(1).abs().max() < 1e-15


def test_a_model_without_gradients_warns_once() -> None:
    model = _model()
    with pytest.warns(
        UserWarning, match=r"no parameter has a gradient: call it after backward\(\) and before zero_grad"
    ):
        centralize_gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centralize_gradients(model)
        _backward(model)
        model[0].weight.grad = None  # a part of the model that is not trained
        centralize_gradients(model)
    assert model[2].weight.grad.mean(1).abs().max() < 1e-15


def test_the_remedies_for_a_model_without_gradients_work() -> None:
    model = _model()
    with pytest.warns(UserWarning, match="centered nothing") as caught:
        centralize_gradients(model)
    found = re.search(r"with (gradcentral.center\(.+?\)); .*computes it: (.+)$", str(caught[0].message))
    assert found
    layout = weight_layout(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    functional = torch.func.grad(lambda p: torch.func.functional_call(model, p, torch.ones(2, 4).double()).sum())
    name, gradient = "2.weight", functional(parameters)["2.weight"]
    scope = {"gradcentral": gradcentral, "model": model, "gradient": gradient, "layout": layout, "name": name}
    assert eval(found[1], scope).mean(1).abs().max() < 1e-15
    exec(found[2], scope)
    _backward(model)
    assert all(p.grad is not None and p.grad.mean(1).abs().max() < 1e-15 for p in layout)


class DPOptimizer(Optimizer):
    """As in Opacus: its step computes the gradients from the samples' gradients."""

    def __init__(self, optimizer: Optimizer) -> None:  # without super().__init__()
        self.original_optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad_sample.sum(0)
        self.original_optimizer.step()


def test_a_model_whose_per_sample_gradients_are_cleared_is_centered() -> None:
    model = _model()
    for p in model.parameters():
        p.grad, p.grad_sample = torch.rand_like(p), None  # as Opacus leaves them
    centralize_gradients(model)
    assert model[0].weight.grad.mean(1).abs().max() < 1e-15


def test_per_sample_gradients_raise_and_the_remedy_works() -> None:
    model = _model()
    optimizer = DPOptimizer(SGD(model.parameters(), lr=0.1))
    for p in model.parameters():
        p.grad_sample = torch.rand(3, *p.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="0.weight has per-sample gradients") as raised:
        centralize_gradients(model)
    exec(str(raised.value).split("with ")[1], {"gradcentral": gradcentral, "optimizer": optimizer, "model": model})
    assert len(attached(optimizer)) == 1
    start, before = model[0].weight.detach().mean(1), model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(model[0].weight.detach().mean(1), start, rtol=0, atol=1e-15)
