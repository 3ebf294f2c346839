"""An optimizer whose parameters were replaced or reshaped after attaching raises at its first step."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import stateless
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import centralize
from gradcentral.targets import PLACEMENTS

can_swap = importlib.util.find_spec("torch.optim._stateless") is not None
if can_swap:
    from torch.optim._stateless import swap_in_optimizer_params_and_state


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(params=["hook", "fused"])
def attached(request: pytest.FixtureRequest) -> tuple[Any, Optimizer]:
    """A model and an optimizer before its first step."""
    model = _model()
    if request.param == "fused":
        return model, gradcentral.SGD(model, lr=0.1)
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    return model, optimizer


def test_flat_partitions_put_into_the_optimizer_raise(attached: tuple[Any, Optimizer]) -> None:
    _, optimizer = attached
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]]))
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed's ZeRO does
    with pytest.raises(RuntimeError, match=r"no longer holds any of the parameters to center.*fully_shard \(FSDP2\)"):
        optimizer.step()


def test_parameters_whose_shape_has_changed_raise(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    model[2].weight.data = model[2].weight.data.flatten()
    with pytest.raises(RuntimeError, match=r"2.weight had shape \(3, 6\) .* has \(18,\) now"):
        optimizer.step()


def test_a_replaced_layer_raises(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    model[2] = nn.Linear(6, 5)
    with pytest.raises(RuntimeError, match=r"the model no longer uses.*\(2.weight\)"):
        optimizer.step()


def test_a_parametrization_of_all_layers_raises(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    for layer in (model[0], model[2]):
        weight_norm(layer)
    with pytest.raises(RuntimeError, match=r"the model no longer uses.*\(0.weight, 2.weight\)"):
        optimizer.step()


def test_a_removed_layer_does_not_raise(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    del model[2]
    torch.autograd.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()


def test_layers_may_be_replaced_after_the_first_step(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    torch.autograd.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    model[2] = nn.Linear(6, 5)
    optimizer.step()


def test_attaching_to_flat_partitions_raises() -> None:
    model = _model()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    with pytest.raises(ValueError, match="flat partitions, such as DeepSpeed's ZeRO, cannot be centered"):
        centralize(SGD([flat], lr=0.1), model)


def test_attaching_to_partitioned_parameters_raises() -> None:
    model = _model()
    weight: Any = model[0].weight
    weight.ds_id, weight.ds_shape = 0, weight.shape  # as DeepSpeed's ZeRO-3 marks them
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="0.weight of shape .* made by DeepSpeed ZeRO-3"):
        gradcentral.SGD(model, lr=0.1)


def test_parameters_registered_under_another_name_do_not_raise() -> None:
    for change in (_wrap, _parametrize, _tie, _replace_and_add):
        for kind in ("attached", "fused"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            optimizer: torch.optim.Optimizer
            if kind == "fused":
                optimizer = gradcentral.SGD(model, lr=0.1)
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                gradcentral.centralize(optimizer, model)
            change(model, optimizer)
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()


def _wrap(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0] = nn.Sequential(model[0])
    model[1] = nn.Sequential(model[1])


def _parametrize(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


def _tie(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1].weight = model[0].weight


def _replace_and_add(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1] = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(model[1].parameters())})


def test_a_second_step_raises_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = gradcentral.SGD(model, lr=0.1)
    model[0] = nn.Linear(4, 4)
    model(torch.randn(3, 4)).square().sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the model no longer uses"):
            optimizer.step()


def _swapped(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return new parameters for a functional step, and the context in which model and optimizer hold them."""
    params = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    contexts = ExitStack()
    contexts.enter_context(stateless._reparametrize_module(model, params))
    state = copy.deepcopy(optimizer.state_dict())
    contexts.enter_context(swap_in_optimizer_params_and_state(optimizer, params, state))
    return params, contexts


@pytest.mark.skipif(not can_swap, reason="needs a torch with torch.optim._stateless")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["hook", "fused"])
def test_the_first_step_after_a_checkpoint_may_be_functional(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, placement)
    torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
    optimizer.step()
    checkpoint = optimizer.state_dict()
    model = _model()
    optimizer = _optimizer(model, kind, placement)
    optimizer.load_state_dict(checkpoint)
    params, contexts = _swapped(model, optimizer)
    with contexts:
        before = {name: p.detach().clone() for name, p in params.items()}
        for p in model.parameters():
            p.grad = torch.rand_like(p) + 0.5
        optimizer.step()
    _assert_means_kept(before, params)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
    optimizer.step()  # a usual step
    _assert_means_kept(before, dict(model.named_parameters()))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["hook", "fused"])
def test_an_optimizer_may_receive_the_new_parameters_of_the_model(kind: str, placement: str) -> None:
    """accelerate replaces the parameters of the model (FSDP2) and then those of the optimizer."""
    model = _model()
    optimizer = _optimizer(model, kind, placement)
    for layer in (model[0], model[2]):
        for name, p in [*layer.named_parameters()]:
            setattr(layer, name, nn.Parameter(p.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
        optimizer.step()
        _assert_means_kept(before, dict(model.named_parameters()))


def _optimizer(model: nn.Module, kind: str, placement: str) -> Optimizer:
    if kind == "fused":
        return gradcentral.SGD(model, lr=0.1, momentum=0.9, placement=placement)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    centralize(optimizer, model, placement)
    return optimizer


def _assert_means_kept(before: dict[str, Tensor], now: Mapping[str, Tensor]) -> None:
    for name, w in before.items():
        assert not torch.equal(now[name], w)
        if w.ndim == 2:
            torch.testing.assert_close(now[name].detach().mean(1), w.mean(1), rtol=0, atol=1e-6)
