"""The option "centralize" of parameter groups, and keys that have no effect."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral import Monitor, centralize
from gradcentral.targets import PLACEMENTS


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def _optimizer(model: Any, kind: str, head: dict[str, Any], placement: str = "gradient") -> Optimizer:
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **head}]
    if kind == "own":
        return gradcentral.SGD(groups, lr=0.1, model=model, placement=placement)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    centralize(optimizer, model, placement)
    return optimizer


def _centered(model: Any, optimizer: Optimizer) -> list[bool]:
    """Take a step and return, for both layers, whether it kept the means."""
    before: list[Tensor] = [layer.weight.detach().clone() for layer in model]
    for p in model.parameters():
        p.grad = torch.rand_like(p) + 0.5
    optimizer.step()
    return [bool((layer.weight - w).mean(1).abs().max() < 1e-6) for layer, w in zip(model, before, strict=True)]


KINDS = pytest.mark.parametrize("kind", ["own", "attached"])


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_group_can_be_left_out(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": False}, placement)
    assert _centered(model, optimizer) == [True, False]
    optimizer.param_groups[1]["centralize"] = True
    assert _centered(model, optimizer) == [True, True]
    optimizer.param_groups[0]["centralize"] = False
    assert _centered(model, optimizer) == [False, True]
    optimizer.param_groups[0]["centralize"] = True
    assert _centered(model, optimizer) == [True, True]


@KINDS
def test_a_checkpoint_without_the_key_does_not_change_it(kind: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": False})
    assert _centered(model, optimizer) == [True, False]
    plain = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert "centralize" not in optimizer.param_groups[1]
    assert _centered(model, optimizer) == [True, False]


def test_the_monitor_does_not_report_a_group_that_is_left_out() -> None:
    model = _model()
    optimizer = _optimizer(model, "attached", {"centralize": False})
    monitor = Monitor(model, optimizer, every=1)
    _centered(model, optimizer)
    assert [*monitor.records[0].layers] == ["0.weight"]


@KINDS
def test_leaving_out_every_group_raises(kind: str) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"nothing is left to center .*1.weight: excluded by its group"):
        _optimizer(model, kind, {"centralize": False})


@KINDS
@pytest.mark.parametrize("key", ["placement", "strength", "layout", "model"])
def test_options_of_the_whole_optimizer_raise(kind: str, key: str) -> None:
    model = _model()
    layout = gradcentral.weight_layout(model[1])
    value = {"placement": "update", "strength": 0.5, "layout": layout, "model": model[1]}[key]
    with pytest.raises(ValueError, match=f"parameter group 1 has the key '{key}'.* create one optimizer per {key}"):
        _optimizer(model, kind, {key: value})


@KINDS
def test_keys_of_other_libraries_are_accepted(kind: str) -> None:
    model = _model()
    keys = {
        "lr_scale": 0.5,
        "use_muon": True,
        "model": "decoder",
        "layout": None,
        "strength": "high",
        "neutralize": True,
    }
    optimizer = _optimizer(model, kind, {**keys, "initial_lr": 0.1, "name": "head", "placement": None})
    assert _centered(model, optimizer) == [True, True]


def test_the_remedy_for_two_placements_works() -> None:
    model = _model()
    with pytest.raises(ValueError, match="create one optimizer per placement"):
        _optimizer(model, "attached", {"placement": "update"})
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    for optimizer, placement in zip(optimizers, ("gradient", "update"), strict=True):
        centralize(optimizer, model, placement)
    assert _centered(model, optimizers[0]) == [True, True]  # the second layer does not move
    assert _centered(model, optimizers[1]) == [True, True]


@KINDS
@pytest.mark.parametrize("key", ["centralise", "centralized", "Centralize"])
def test_misspelled_keys_raise_and_the_remedy_works(kind: str, key: str) -> None:
    model = _model()
    with pytest.raises(ValueError, match=f"parameter group 1 has the key '{key}', which has no effect") as raised:
        _optimizer(model, kind, {key: False})
    found = re.search('use ("centralize": False) to leave', str(raised.value))
    assert found
    assert _centered(model, _optimizer(model, kind, eval(f"{{{found[1]}}}"))) == [True, False]


@KINDS
def test_other_values_raise(kind: str) -> None:
    with pytest.raises(ValueError, match='parameter group 1: "centralize" must be True or False, not 0'):
        _optimizer(_model(), kind, {"centralize": 0})


@KINDS
def test_groups_added_later_are_checked(kind: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {})
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": list(model[2].parameters()), "placement": "update"})
    with pytest.raises(ValueError, match="parameter group 2 has the key 'placement'"):
        _centered(model, optimizer)
    optimizer.param_groups[2].pop("placement")
    optimizer.param_groups[2]["centralize"] = False
    assert _centered(model, optimizer) == [True, True, False]


def test_keys_of_the_optimizer_itself_are_its_own() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.defaults["layout"] = None
            for group in self.param_groups:
                group["layout"] = None
                group["use_gc"] = False

    model = _model()
    optimizer = Own(model.parameters())
    centralize(optimizer, model)
    assert _centered(model, optimizer) == [True, True]


@pytest.mark.parametrize("options", [{"placement": "update"}, {"strength": 1.0}, {}])
def test_wrappers_may_copy_the_arguments_of_an_own_optimizer_into_its_groups(options: dict[str, Any]) -> None:
    """SAM and ZeroRedundancyOptimizer do."""
    model = _model()
    arguments = {"lr": 0.1, "model": model, **options}
    optimizer = gradcentral.SGD([{"params": layer.parameters(), **arguments} for layer in model], **arguments)
    assert _centered(model, optimizer) == [True, True]
