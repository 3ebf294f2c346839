"""The option "centralize" of parameter groups, and keys that have no effect."""

from __future__ import annotations

import copy
import math
import pickle
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
    assert _centered(model, optimizer) == [True, False]
    assert optimizer.param_groups[1]["centralize"] is False  # so that the next checkpoint contains it
    assert "centralize" not in optimizer.param_groups[0]


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
@pytest.mark.parametrize("key", ["placement", "layout", "model"])
def test_options_of_the_whole_optimizer_raise(kind: str, key: str) -> None:
    model = _model()
    layout = gradcentral.weight_layout(model[1])
    value = {"placement": "update", "layout": layout, "model": model[1]}[key]
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
    found = re.search('use ("centralize": False); ', str(raised.value))
    assert found
    assert _centered(model, _optimizer(model, kind, eval(f"{{{found[1]}}}"))) == [True, False]


@KINDS
@pytest.mark.parametrize("key", ["strength", "centralise"])
def test_a_strength_under_another_key_raises_and_the_remedy_works(kind: str, key: str) -> None:
    model = _model()
    with pytest.raises(ValueError, match=f"parameter group 1 has the key '{key}', which has no effect") as raised:
        _optimizer(model, kind, {key: 0.25})
    found = re.search(r'use ("centralize": 0\.25)', str(raised.value))
    assert found
    assert _rest_of_means(model, _optimizer(model, kind, eval(f"{{{found[1]}}}"))) == [0.0, 0.75]


@KINDS
@pytest.mark.parametrize("value", ["all", (), 1j, [0.5]])
def test_other_values_raise(kind: str, value: Any) -> None:
    message = 'parameter group 1: "centralize" must be True, False or a strength between 0 and 1, not '
    with pytest.raises(ValueError, match=re.escape(f"{message}{value!r}")):
        _optimizer(_model(), kind, {"centralize": value})


@KINDS
@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan, math.inf, torch.tensor(2.0), torch.tensor(math.nan), 2])
def test_a_strength_outside_0_to_1_raises(kind: str, value: Any) -> None:
    with pytest.raises(ValueError, match='parameter group 1: "centralize" must be between 0 and 1, not '):
        _optimizer(_model(), kind, {"centralize": value})
    for tensor in (torch.ones(2), torch.tensor(True)):
        with pytest.raises(ValueError, match='parameter group 1: "centralize" must be a number or a 0-dim tensor'):
            _optimizer(_model(), kind, {"centralize": tensor})
    model = _model()
    optimizer = _optimizer(model, kind, {})
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1]["centralize"] = value
    with pytest.raises(ValueError, match='"centralize" must be between 0 and 1, not '):
        _centered(model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@KINDS
def test_a_tensor_is_checked_in_every_step(kind: str) -> None:
    model, strength = _model(), torch.tensor(0.5)
    optimizer = _optimizer(model, kind, {"centralize": strength})
    assert _rest_of_means(model, optimizer) == [0.0, 0.5]
    assert _rest_of_means(model, optimizer, strength.fill_(0.75)) == [0.0, 0.25]
    with pytest.raises(ValueError, match='"centralize" of a parameter group must be between 0 and 1, not 1.5'):
        _rest_of_means(model, optimizer, strength.fill_(1.5))


# Strengths of groups.


def _rest_of_means(model: Any, optimizer: Optimizer, *_: object) -> list[float]:
    """Take a step with plain gradients; return, for both layers, the part of the mean of the change that remains."""
    before: list[Tensor] = [layer.weight.detach().clone() for layer in model]
    for p in model.parameters():
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
    optimizer.step()
    found = []
    for number, (layer, w) in enumerate(zip(model, before, strict=True)):
        gradient = torch.arange(1.0, layer.weight.numel() + 1).view(layer.weight.shape)
        parts = (layer.weight.detach() - w).mean(1) / (-0.1 * gradient).mean(1)
        assert parts.max() - parts.min() < 1e-4, number
        found.append(round(float(parts.mean()), 4) + 0.0)
    return found


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_number_is_the_strength_of_the_group_and_replaces_that_of_the_optimizer(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": 0.25}, placement)
    holder: Any = optimizer if kind == "own" else gradcentral.attached(optimizer)[0]
    assert _rest_of_means(model, optimizer) == [0.0, 0.75]
    holder.strength = 0.5
    assert _rest_of_means(model, optimizer) == [0.5, 0.75]
    for value, rest in ((1.0, 0.0), (True, 0.5), (0.0, 1.0), (1, 0.0), (False, 1.0), (0.75, 0.25), (0, 1.0)):
        optimizer.param_groups[1]["centralize"] = value
        assert _rest_of_means(model, optimizer) == [0.5, rest], value
    holder.strength = 0.0
    optimizer.param_groups[1]["centralize"] = 0.75
    assert _rest_of_means(model, optimizer) == [1.0, 0.25]


@KINDS
@pytest.mark.parametrize("tensor", [False, True])
def test_checkpoints_of_torch_load_in_both_directions_and_keep_the_strength(kind: str, tensor: bool) -> None:
    model = _model()
    strength: Any = torch.tensor(0.25) if tensor else 0.25
    optimizer = _optimizer(model, kind, {"centralize": strength})
    plain = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    for _ in range(2):
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer.state_dict()["param_groups"][1]["centralize"] == 0.25  # before the next step, too
        assert _rest_of_means(model, optimizer) == [0.0, 0.75]
        assert optimizer.state_dict()["param_groups"][1]["centralize"] == 0.25
    plain.load_state_dict(optimizer.state_dict())
    assert _rest_of_means(model, plain) == [1.0, 1.0]
    other = _optimizer(model, kind, {"centralize": 0.5})
    other.load_state_dict(optimizer.state_dict())  # a checkpoint with the key replaces the setting, as it does lr
    assert _rest_of_means(model, other) == [0.0, 0.75]


@pytest.mark.parametrize("setting", [False, 0.25])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_made_after_loading_keeps_the_setting(copier: Any, setting: Any) -> None:
    model = _model()
    optimizer = _optimizer(model, "own", {"centralize": setting})
    plain = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    copied = copier(optimizer)
    assert copied.param_groups[1]["centralize"] == setting


def test_attaching_again_after_loading_keeps_the_setting() -> None:
    model = _model()
    optimizer = _optimizer(model, "attached", {"centralize": 0.25})
    plain = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    gradcentral.attached(optimizer)[0].remove()
    centralize(optimizer, model, "update")
    assert _rest_of_means(model, optimizer) == [0.0, 0.75]


@KINDS
def test_settings_follow_the_parameters_of_reordered_groups(kind: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": 0.25})
    optimizer.param_groups.reverse()
    layers: Any = [model[1], model[0]]
    plain = torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert _rest_of_means(model, optimizer) == [0.0, 0.75]
    assert [group.get("centralize") for group in optimizer.param_groups] == [0.25, None]


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_group_added_later_has_its_strength(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": 0.5}, placement)
    assert _rest_of_means(model, optimizer) == [0.0, 0.5]
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": list(model[2].parameters()), "centralize": 0.25})
    assert _rest_of_means(model, optimizer) == [0.0, 0.5, 0.75]


def test_two_handles_share_the_groups_and_pause_alone() -> None:
    first, second = _model(), _model()
    both = nn.ModuleList([*first, *second])
    groups: list[dict[str, Any]] = [
        {"params": [*first.parameters()], "centralize": 0.5},
        {"params": [*second.parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    handle = centralize(optimizer, first)
    centralize(optimizer, second, "update", strength=0.25)
    assert _rest_of_means(both, optimizer) == [0.5, 0.5, 0.75, 0.75]
    optimizer.param_groups[1]["centralize"] = 0.75
    with handle.paused():
        assert _rest_of_means(both, optimizer) == [1.0, 1.0, 0.25, 0.25]
    assert _rest_of_means(both, optimizer) == [0.5, 0.5, 0.25, 0.25]


@KINDS
@pytest.mark.parametrize("placement", ["gradient", "regularized"])
def test_a_setting_changed_in_the_closure_applies_to_its_gradients(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(model, kind, {"centralize": 0.5}, placement)
    before = model[1].weight.detach().clone()
    gradient = torch.arange(1.0, 19.0).view(3, 6)

    def closure() -> float:
        optimizer.param_groups[1]["centralize"] = 0.25
        model[1].weight.grad = gradient.clone()
        return 0.0

    optimizer.step(closure)
    torch.testing.assert_close(before - model[1].weight, 0.1 * gradcentral.center(gradient, "o [i]", 0.25))


def test_lbfgs_centers_each_closure_with_the_strength_of_its_group() -> None:
    data = torch.randn(8, 4, dtype=torch.float64)
    trained = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3, dtype=torch.float64)
        group = {"params": [*model.parameters()], "centralize": 0.25}
        optimizer = torch.optim.LBFGS([group], lr=0.1, max_iter=4)
        if not by_hand:
            centralize(optimizer, model)

        def closure(model: nn.Linear = model, by_hand: bool = by_hand) -> Tensor:
            model.zero_grad()
            loss: Tensor = model(data).square().sum()
            torch.autograd.backward(loss)
            assert model.weight.grad is not None
            if by_hand:
                model.weight.grad = gradcentral.center(model.weight.grad, "o [i]", 0.25)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        trained.append(model.weight.detach())
    torch.testing.assert_close(*trained, rtol=0, atol=1e-12)


def test_groups_that_are_merged_need_the_key() -> None:
    model = _model()
    optimizer = _optimizer(model, "attached", {"centralize": 0.25})
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    with pytest.raises(ValueError, match='parameter group 0 has no "centralize", and its parameters had different'):
        _rest_of_means(model, optimizer)
    optimizer.param_groups[0]["centralize"] = 0.5
    assert _rest_of_means(model, optimizer) == [0.5, 0.5]


def test_a_strength_that_changes_in_every_step_adds_no_plans() -> None:
    model = _model()
    optimizer: Any = _optimizer(model, "own", {"centralize": 0.5})
    for step in range(1, 20):
        optimizer.param_groups[1]["centralize"] = step / 20
        assert _rest_of_means(model, optimizer)[1] == pytest.approx(1 - step / 20, abs=1e-4)
    assert len(optimizer._plans) == 2


def test_a_schedule_multiplies_the_strengths_of_all_groups() -> None:
    """Groups have no multiple of the optimizer's strength; a loop over the groups, as in docs/optimizers.md, has."""
    model = _model()
    optimizer = _optimizer(model, "own", {"centralize": 0.5})
    for factor in (0.0, 0.5, 1.0):
        for group, strength in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["centralize"] = factor * strength
        assert _rest_of_means(model, optimizer) == [1 - factor, 1 - factor / 2]


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


def test_a_copied_strength_is_harmless_after_the_optimizers_strength_has_changed() -> None:
    model = _model()
    arguments: dict[str, Any] = {"lr": 0.1, "strength": 1.0}
    groups = [{"params": list(layer.parameters()), **arguments} for layer in model]
    optimizer = gradcentral.SGD(groups, **arguments, model=model)
    optimizer.strength = 0.5
    optimizer.param_groups[1]["centralize"] = 0.25
    assert _rest_of_means(model, optimizer) == [0.5, 0.75]
