"""The warning for an optimizer whose step is never called although its weights change."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing  # registers tensors with the pickler of multiprocessing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, AdamW, Optimizer

import gradcentral
from gradcentral import centralize, centralize_in_backward


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _backward(model: nn.Module) -> None:
    torch.autograd.backward((model(torch.rand(5, 4, dtype=torch.float64)) - 1).square().mean())


def _train(model: nn.Module, step: Callable[[], object]) -> None:
    for _ in range(12):
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
    exec(remedy, {"gradcentral": gradcentral, "model": model})
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
    exec(remedy, {"gradcentral": gradcentral, "model": model, "optimizer": optimizer})
    start = _means(model)
    _backward(model)
    optimizer.update()
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("own", [False, True])
def test_an_optimizer_that_is_stepped_later_does_not_warn(own: bool) -> None:
    """Adam first and LBFGS later; in notebooks, an optimizer that was created again."""
    model = _model()
    first: Optimizer = gradcentral.SGD(model, lr=0.1) if own else SGD(model.parameters(), lr=0.1)
    if not own:
        centralize(first, model)
    later = torch.optim.LBFGS(model.parameters(), lr=0.1)
    centralize(later, model)
    _train(model, first.step)

    def closure() -> float:
        _backward(model)
        return 0.0

    later.step(closure)


def test_a_plain_optimizer_in_its_place_warns() -> None:
    model = _model()
    attached_to = SGD(model.parameters(), lr=0.1)
    centralize(attached_to, model)
    with pytest.warns(UserWarning, match=r"SGD.step\(\).* is not called, so nothing is centered"):
        _train(model, SGD(model.parameters(), lr=0.1).step)


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
def test_weights_that_change_a_few_times_before_the_first_step_do_not_warn() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    _backward(model)
    for _ in range(4):
        model.load_state_dict(_model().state_dict())
        for _ in range(3):
            _backward(model)


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("first", ["attached", "list", "own"])
def test_an_optimizer_for_a_later_phase_does_not_warn(first: str) -> None:
    model = _model()
    later = SGD(model.parameters(), lr=0.1)
    now = gradcentral.AdamW(model) if first == "own" else AdamW(model.parameters())
    if first == "attached":
        centralize(now, model)
    centralize([now, later] if first == "list" else later, model)
    for optimizer in (now, later):
        _train(model, optimizer.step)


@pytest.mark.usefixtures("_no_warnings")
def test_a_paused_handle_does_not_warn() -> None:
    model = _model()
    handle = centralize(SGD(model.parameters(), lr=0.1), model)
    handle.pause()
    _train(model, SGD(model.parameters(), lr=0.1).step)


def test_an_optimizer_beside_the_one_in_use_warns_and_the_remedy_works() -> None:
    model = _model()
    forgotten, other_optimizer = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    centralize(forgotten, model)
    with pytest.warns(UserWarning, match="another optimizer, SGD, holds the same weights: attach to it") as caught:
        _train(model, other_optimizer.step)
    remedy = re.search(r"attach to it with (.*\)), or", str(caught[0].message))
    assert remedy
    exec(remedy[1], {"gradcentral": gradcentral, "model": model, "other_optimizer": other_optimizer})
    start = _means(model)
    _backward(model)
    other_optimizer.step()
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("restored", ["exactly", "up to rounding"])
def test_perturbing_the_weights_in_accumulated_batches_does_not_warn(restored: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    for _ in range(20):
        _backward(model)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 + 0.1 * torch.rand_like(p))
            with torch.enable_grad():
                _backward(model)
            for p, w in zip(model.parameters(), before, strict=True):
                p.copy_(w if restored == "exactly" else w * (1 + 1e-15))
    optimizer.step()


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_backward_passes_without_values_are_not_compared(without_values: Callable[[], Any]) -> None:
    with without_values():
        model = nn.Linear(4, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        centralize(optimizer, model)
        for _ in range(3):
            model(torch.rand(5, 4)).sum().backward()
        optimizer.step()


@pytest.mark.usefixtures("_no_warnings")
def test_a_backward_pass_can_be_traced_before_the_first_step() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    _backward(model)

    def gradients(x: torch.Tensor) -> Any:
        return torch.autograd.grad(model(x).sum(), [*model.parameters()])

    graph = make_fx(gradients)(torch.rand(5, 4, dtype=torch.float64))
    assert not any("equal" in str(node.target) or "allclose" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.usefixtures("_no_warnings")
def test_attaching_does_not_prevent_conversions_that_swap_parameters() -> None:
    model = _model()
    centralize(SGD(model.parameters(), lr=0.1), model)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert model[0].weight.dtype == torch.float32


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
