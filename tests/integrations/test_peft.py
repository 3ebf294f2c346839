"""PEFT: adapters are centered in a loop and in a Trainer; an optimizer without them is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft: run `make trainers`")
pytest.importorskip("accelerate", reason="needs accelerate: run `make trainers`")

from tests.integrations.hand_written import difference
from tests.integrations.hugging_face import build, data, train_by_hand, trainer

# isort: split
from peft import LoraConfig, get_peft_model

import gradcentral
from gradcentral.integrations.transformers import GradientCentralization
from tests.integrations.pages import run_page

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

LAYERS = ["c_attn", "c_fc"]


def adapted(**options: Any) -> Any:
    """Create a model with adapters, whose B is not zero, so that A trains from the first step."""
    config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "fan_in_fan_out": True, "lora_dropout": 0.0, **options})
    model = get_peft_model(build(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def centered(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """Return the trained parameters that are to be centered, with the axis of their inputs."""
    axes = {"lora_A": 1, "lora_B": 1, "c_proj.modules_to_save": 0}
    return {
        name: (parameter, axis)
        for name, parameter in model.named_parameters()
        for part, axis in axes.items()
        if part in name and parameter.requires_grad and parameter.ndim == 2 and parameter.shape[1] > 1
    }


def center_by_hand(model: nn.Module) -> None:
    """Subtract the means of the gradients over the inputs."""
    for parameter, axis in centered(model).values():
        assert parameter.grad is not None
        parameter.grad -= parameter.grad.mean(axis, keepdim=True)


CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 4),
    ({"use_dora": True}, 4),
    ({"r": 1}, 2),  # B has one number per weight vector
    ({"modules_to_save": ["mlp.c_proj"]}, 5),
]


@pytest.mark.parametrize(("options", "count"), CASES)
def test_a_loop_equals_a_loop_by_hand(options: dict[str, Any], count: int) -> None:
    assert len(centered(adapted(**options))) == count
    models = [adapted(**options), adapted(**options)]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    handle = gradcentral.centralize(optimizer, models[0])
    train_by_hand(models[0], steps=4, center=None, create=lambda _: optimizer)
    train_by_hand(models[1], steps=4, center=center_by_hand)
    trained = {handle.layout.names[p] for p in handle.layout if p.requires_grad}
    assert trained == {*centered(models[0])}
    assert difference(*models) < 1e-7
    assert difference(models[0], train_by_hand(adapted(**options), steps=4, center=None)) > 1e-5


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_training_with_a_trainer_equals_a_loop_by_hand(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(**options)
    trainer(tmp_path, model, GradientCentralization(), label_names=["labels"], max_grad_norm=0.2).train()
    expected = train_by_hand(adapted(**options), steps=4, clip=0.2, center=center_by_hand)
    uncentered = train_by_hand(adapted(**options), steps=4, clip=0.2, center=None)
    assert difference(model, expected) < 1e-7
    assert difference(expected, uncentered) > 1e-5


def test_placement_update_keeps_the_means_of_a_second_adapter_too() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gradcentral.centralize(optimizer, model, "update")
    train_by_hand(model, steps=2, center=None, create=lambda _: optimizer)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.set_adapter("second")
    added = {name: p for name, p in model.named_parameters() if ".second." in name}
    optimizer.add_param_group({"params": [*added.values()]})
    before = {name: p.detach().double().mean(1) for name, p in added.items()}
    start = {name: p.detach().clone() for name, p in added.items()}
    train_by_hand(model, steps=4, center=None, create=lambda _: optimizer)
    assert len(added) == 2
    for name, p in added.items():
        assert (p.detach().double().mean(1) - before[name]).abs().max() < 1e-7
        assert (p.detach() - start[name]).abs().max() > 1e-3


def test_an_optimizer_created_before_the_adapters_is_reported() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    gradcentral.centralize(optimizer, model)
    adapted_model = get_peft_model(model, LoraConfig(target_modules=LAYERS, fan_in_fan_out=True))
    tokens = data()[0]["input_ids"][None]
    adapted_model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.warns(UserWarning, match="holds frozen parameters only.* after get_peft_model"):
        optimizer.step()


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("peft")
    assert page["monitor"].records[-1].net.drift < 1e-6
    assert page["monitor"].records[0].net.share > 0
