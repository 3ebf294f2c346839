"""The check that a run trains as its arm requires: it accepts unmodified runs and detects every manipulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradcentral
from gradcentral import centralize
from gradcentral.experiment import ArmError
from gradcentral.experiment.arms import ARMS, CheckedArm

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "huge steps": lambda params: torch.optim.SGD(params, lr=1e4),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def gradients(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.rand(8, 2, 4, 4, dtype=dtype)).square().mean().backward()


def step(checked: CheckedArm, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    gradients(model)
    checked.watch()
    optimizer.step()
    checked.verify()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("arm", ARMS)
def test_an_unmodified_run_passes(arm: str, maker: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = MAKERS[maker](model.parameters())
    checked = CheckedArm(arm, model, optimizer)
    for _ in range(3):
        step(checked, model, optimizer)


@pytest.mark.parametrize("arm", ["gradient", "regularized", "update"])
def test_a_removed_handle_is_detected(arm: str) -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    checked = CheckedArm(arm, model, optimizer)
    step(checked, model, optimizer)
    assert checked.handle is not None
    checked.handle.remove()
    with pytest.raises(ArmError, match=f"arm '{arm}' was changed during the run: nothing is attached to the optimizer"):
        step(checked, model, optimizer)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("gradient", r"0\.weight: a weight vector's gradient has a mean"),
        ("regularized", r"0\.weight: a weight vector's gradient with its weight decay has a mean"),
        ("update", r"0\.weight: the step moved the mean"),
    ],
)
def test_a_paused_handle_is_detected(arm: str, message: str) -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    checked = CheckedArm(arm, model, optimizer)
    assert checked.handle is not None
    with checked.handle.paused(), pytest.raises(ArmError, match=message):
        step(checked, model, optimizer)


def test_centering_without_the_weight_decay_is_not_accepted_as_regularized() -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    checked = CheckedArm("regularized", model, optimizer)
    assert checked.handle is not None
    checked.handle.pause()
    optimizer.register_step_pre_hook(lambda *_: gradcentral.centralize_gradients(model))
    optimizer.register_step_pre_hook(checked._keep_received)  # what the optimizer receives, after the hook above
    with pytest.raises(ArmError, match=r"0\.weight: a weight vector's gradient with its weight decay has a mean"):
        step(checked, model, optimizer)


def test_gc_attached_in_arm_none_is_detected() -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    checked = CheckedArm("none", model, optimizer)
    step(checked, model, optimizer)
    centralize(optimizer, model)
    with pytest.raises(ArmError, match="arm 'none' was changed during the run"):
        step(checked, model, optimizer)


def test_an_optimizer_with_gc_attached_is_refused() -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    centralize(optimizer, model)
    with pytest.raises(ArmError, match="already centers gradients"):
        CheckedArm("none", model, optimizer)


def test_a_gradcentral_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(ArmError, match="already centers gradients"):
        CheckedArm("none", model, gradcentral.SGD(model, lr=0.1))


def test_a_group_with_a_strength_is_refused_and_the_remedy_works() -> None:
    model = network()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
    groups[0]["centralize"] = 0.5
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ArmError, match='a parameter group .* has a strength, .* use "centralize": False to leave'):
        CheckedArm("gradient", model, optimizer)
    optimizer.param_groups[0]["centralize"] = False
    step(CheckedArm("gradient", model, optimizer), model, optimizer)


@pytest.mark.parametrize("arm", ["none", "update"])
def test_gradients_changed_before_the_optimizer_receives_them_are_detected(arm: str) -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())

    def tamper(*_: object) -> None:
        gradient = model[3].bias.grad  # type: ignore[index]
        gradient[0] += 1e-3 * gradient.abs().max()

    optimizer.register_step_pre_hook(tamper)
    checked = CheckedArm(arm, model, optimizer)
    with pytest.raises(ArmError, match=r"3\.bias: its gradient was changed before the optimizer received it"):
        step(checked, model, optimizer)


def test_a_scaled_centered_gradient_is_detected() -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())

    def scale(*_: object) -> None:
        model[0].weight.grad.mul_(1.01)  # type: ignore[index]

    optimizer.register_step_pre_hook(scale)
    checked = CheckedArm("gradient", model, optimizer)
    with pytest.raises(ArmError, match=r"0\.weight: its centered gradient is not Φ of the raw one"):
        step(checked, model, optimizer)


def test_a_step_that_moves_the_mean_is_detected() -> None:
    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    checked = CheckedArm("update", model, optimizer)

    def nudge(*_: object) -> None:
        with torch.no_grad():
            model[3].weight[1] += 1e-4  # type: ignore[index]

    optimizer.register_step_post_hook(nudge)
    with pytest.raises(ArmError, match=r"3\.weight: the step moved the mean of a weight vector by 1\.0e-04"):
        step(checked, model, optimizer)


def test_steps_with_gradients_that_are_not_finite_are_not_checked() -> None:
    model = network()
    optimizer = MAKERS["sgd"](model.parameters())
    checked = CheckedArm("gradient", model, optimizer)
    gradients(model)
    model[0].weight.grad.fill_(torch.inf)  # type: ignore[index]
    checked.watch()
    optimizer.step()
    checked.verify()


def test_share_is_that_of_the_raw_gradient_of_all_parameters() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checked = CheckedArm("gradient", model, optimizer)
    # One row that is all mean, one with zero mean, and a skipped bias: 4 of 4 + 4 + 8.
    model.weight.grad = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]])
    model.bias.grad = torch.tensor([2.0, 2.0])
    assert checked.watch().share == pytest.approx(0.25)
