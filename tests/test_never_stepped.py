"""The warning for an optimizer whose step is never called although its weights change."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing  # registers tensors with the pickler of multiprocessing
from torch import nn
from torch.optim import SGD, Optimizer

from gradcentral import centralize, centralize_in_backward


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _backward(model: nn.Module) -> None:
    torch.autograd.backward((model(torch.rand(5, 4, dtype=torch.float64)) - 1).square().mean())


def _train(model: nn.Module, step: Callable[[], object]) -> None:
    for _ in range(8):
        _backward(model)
        step()


def _means(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().mean(1) for p in model.parameters() if p.ndim == 2]


class StepsInBackward(Optimizer):
    """An optimizer that updates each parameter when its gradient is complete, as LOMO does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self._update)

    def _update(self, p: Any) -> None:
        p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"])  # p.data does not count as a change of p
        p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Accumulating(Optimizer):
    """A wrapper with hooks around ``.optimizer``, trained by its method ``update``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:  # type: ignore[override]
        self.update()


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_steps_in_backward_warn_once_and_the_remedy_works(placement: str) -> None:
    model = _model()
    optimizer = StepsInBackward(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model, placement)
    with pytest.warns(UserWarning, match=r"StepsInBackward.step\(\).* is not called, so nothing is centered") as caught:
        _train(model, lambda: None)
    assert len(caught) == 1
    handle.remove()
    model = _model()
    optimizer = StepsInBackward(model.parameters(), lr=0.1)
    remedy = str(caught[0].message).split("computes it: ")[1]
    exec(remedy, {"gradcentral": __import__("gradcentral"), "model": model})
    start, before = _means(model), model[0].weight.detach().clone()
    for _ in range(3):
        _backward(model)
    assert not torch.equal(model[0].weight, before)
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


def test_a_wrapper_that_is_trained_by_another_method_warns_and_the_remedy_works() -> None:
    model = _model()
    optimizer = Accumulating(SGD(model.parameters(), lr=0.1))
    centralize(optimizer, model)
    with pytest.warns(UserWarning, match="attach to the optimizer inside: gradcentral") as caught:
        _train(model, optimizer.update)
    remedy = str(caught[0].message).split("inside: ")[1]
    exec(remedy, {"gradcentral": __import__("gradcentral"), "model": model, "optimizer": optimizer})
    start = _means(model)
    _backward(model)
    optimizer.update()
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


@pytest.fixture
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_no_warnings")
def test_usual_training_does_not_warn() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    for step in range(12):
        _backward(model)
        if step % 4 == 3:  # gradients are accumulated
            optimizer.step()
            optimizer.zero_grad()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.usefixtures("_no_warnings")
def test_weights_that_change_once_before_the_first_step_do_not_warn() -> None:
    model, other = _model(), _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    _backward(model)
    model.load_state_dict(other.state_dict())
    for _ in range(3):
        _backward(model)


@pytest.mark.usefixtures("_no_warnings")
def test_optimizers_that_are_not_in_use_do_not_warn() -> None:
    model = _model()
    removed = SGD(model.parameters(), lr=0.1)
    centralize(removed, model).remove()
    forgotten = SGD(model.parameters(), lr=0.1)
    handle = centralize(forgotten, model)
    del forgotten
    gc.collect()
    assert "not attached" in repr(handle)
    plain = SGD(model.parameters(), lr=0.1)
    _train(model, plain.step)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.usefixtures("_no_warnings")
def test_steps_in_backward_of_a_model_that_is_centered_in_backward_do_not_warn() -> None:
    model = _model()
    optimizer = StepsInBackward(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    centralize_in_backward(model)
    start = _means(model)
    _train(model, lambda: None)
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("_no_warnings")
def test_models_without_a_parameter_to_watch_can_be_attached_to() -> None:
    frozen = _model().requires_grad_(False)
    centralize(SGD(frozen.parameters(), lr=0.1), frozen)
    lazy = nn.Sequential(nn.LazyLinear(3))
    centralize(SGD(lazy.parameters(), lr=0.1), lazy)


@pytest.mark.usefixtures("_no_warnings")
def test_a_model_with_a_watched_parameter_can_be_copied_and_sent() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p._backward_hooks for p in twin.parameters())
    ForkingPickler.dumps(model)  # as when a process is started
