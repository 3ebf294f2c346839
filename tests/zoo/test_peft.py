"""PEFT: adapters around torch.nn and transformers layers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import gradcentral
from gradcentral import WeightVectors, centralize
from tests.zoo.checks import Architecture, build, check_classified, check_moves, library

peft: Any = library("peft")


class _Net(nn.Module):
    """A network with one layer of each kind that adapters support."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.linear = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.image(x[:, None]).mean(1)
        return self.head(self.linear(x).tanh())  # type: ignore[no-any-return]


class _Experts(nn.Module):
    """A layer with raw parameters of experts, which LoRA can also target."""

    weight_vectors: ClassVar = {"up": "e o [i]"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bti,eoi->bto", x, self.up)


class _MixtureNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _Experts()
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(tokens % 6, 6).double()
        return self.head(self.experts(x).tanh())  # type: ignore[no-any-return]


def _tokens(model: nn.Module) -> Any:
    return model(torch.arange(10).reshape(2, 5))


def _of(name: str, config: Any, special: Any, base: type[nn.Module] = _Net) -> Architecture:
    return Architecture(name, lambda: peft.get_peft_model(base(), config()), _tokens, special)


_LINEAR = {"target_modules": ["linear"]}
_TARGETS = {"target_modules": ["linear", "conv", "image"], "modules_to_save": ["head"]}

_EMBEDDING = {"*.lora_embedding_A.default": "lookup", "*.lora_embedding_B.default": (1,)}
_EXPERTS = {"*.experts.base_layer.up": (2,), "*.experts.lora_B.default.weight": WeightVectors((1,), view=(8, 4, 3))}

ARCHITECTURES = [
    _of("lora", lambda: peft.LoraConfig(r=4, target_modules=["linear", "conv", "image", "embed"]), _EMBEDDING),
    _of("lora rank 1", lambda: peft.LoraConfig(r=1, target_modules=["linear", "conv"]), {}),
    _of(
        "dora",
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["linear", "image"]),
        {"*.image.lora_magnitude_vector.default.weight": "magnitude"},
    ),
    _of("lora on parameters", lambda: peft.LoraConfig(r=4, target_parameters=["experts.up"]), _EXPERTS, _MixtureNet),
    _of(
        "adalora",
        lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["linear"]),
        {"*.lora_[AB].default": (1,), "*.lora_E.default": "singular"},
    ),
    _of("loha", lambda: peft.LoHaConfig(r=4, **_TARGETS), {"*.hada_*": "factor"}),
    _of("lokr", lambda: peft.LoKrConfig(r=4, **_TARGETS), {"*.lokr_*": "factor"}),
]
WITHOUT_UNITS = [
    _of("oft", lambda: peft.OFTConfig(oft_block_size=4, **_LINEAR), {"*.oft_R.default.weight": "rotation"}),
    _of(
        "boft",
        lambda: peft.BOFTConfig(boft_block_size=4, **_LINEAR),
        {"*.boft_R.default": "rotation", "*.boft_s.default": "scale"},
    ),
    _of("ia3", lambda: peft.IA3Config(feedforward_modules=[], **_LINEAR), {"*.ia3_l.default": "scale"}),
    _of("vera", lambda: peft.VeraConfig(r=4, **_LINEAR), {}),
    _of("hra", lambda: peft.HRAConfig(r=4, **_LINEAR), {"*.hra_u.default": "rotation"}),
]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WITHOUT_UNITS], ids=lambda a: a.name)
def test_every_parameter_is_classified(architecture: Architecture) -> None:
    check_classified(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_nothing_is_frozen(architecture: Architecture) -> None:
    check_moves(architecture)


@pytest.mark.parametrize("architecture", WITHOUT_UNITS, ids=lambda a: a.name)
def test_adapters_without_weight_vectors_are_refused(architecture: Architecture) -> None:
    model = build(architecture)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="nothing is left to center"):
        centralize(optimizer, model)


@pytest.mark.parametrize("kind", ["attached", "fused"])
def test_adapters_added_after_the_optimizer_are_reported(kind: str) -> None:
    """get_peft_model freezes all that the optimizer holds."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer: torch.optim.Optimizer
    if kind == "fused":
        optimizer = gradcentral.SGD(model, lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        centralize(optimizer, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    adapted(torch.randn(5, 4)).square().sum().backward()
    with pytest.warns(
        UserWarning, match="lacks the trained parameters 0.lora_A.default.weight, 0.lora_B.default.weight"
    ):
        optimizer.step()
    optimizer.step()
