"""An optimizer whose parameters were replaced or reshaped after attaching raises at its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import centralize


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
