"""The kinds of model that the probe recognizes, and what it says about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gradcentral import probe
from gradcentral.diagnostics import advice as module
from gradcentral.diagnostics.advice import PAGE, advice, kinds_of

ROOT = Path(__file__).parents[2]


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


class LoraLinear(nn.Linear):
    """Stands in for the layers of peft, whose names contain "Lora"."""


MODELS = {
    "batchnorm": (lambda: convolutional(nn.BatchNorm2d(4)), ("CNN with BatchNorm", "fine-tuning a CNN with BatchNorm")),
    "groupnorm": (lambda: convolutional(nn.GroupNorm(2, 4)), ("CNN with GroupNorm or LayerNorm",)),
    "no norm": (lambda: convolutional(nn.Identity()), ("CNN without normalization",)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2), ("transformer with LayerNorm or RMSNorm",)),
    "vision transformer": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 2, 2), nn.TransformerEncoderLayer(8, 2)),
        ("transformer with LayerNorm or RMSNorm",),
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 4, 4]), nn.Conv2d(2, 2, 3), nn.Linear(8, 99)),
        ("CNN with GroupNorm or LayerNorm",),
    ),
    "lora": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), LoraLinear(8, 2)),
        ("fine-tuning a transformer with LoRA",),
    ),
    "gru": (lambda: nn.GRU(4, 4), ("GRU",)),
    "autoencoder": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ConvTranspose2d(2, 1, 2)),
        ("convolutional autoencoder",),
    ),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), ("linear layers with sigmoid",)),
    "unknown": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()), ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_kind_follows_from_the_layers(name: str) -> None:
    make, kinds = MODELS[name]
    assert kinds_of(make()) == kinds


def test_the_advice_repeats_the_interval_and_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [
        {"arm": "gradient", "mean": 1.23, "low": -0.5, "high": 3.0, "cells": "no clear effect in 3"},
        {"arm": "update", "mean": -4.0, "low": -6.0, "high": -2.0, "cells": "worse in 2 of 3"},
    ]
    monkeypatch.setattr(module, "_evidence", lambda: {"GRU": measured})
    text = advice(("GRU",))
    assert (
        '"gradient" +1.2% [-0.5, +3.0], no clear effect in 3 cells; "update" -4.0% [-6.0, -2.0], worse in 2 of 3 cells.'
        in text
    )
    assert PAGE in text
    assert "No measurements" in advice(("linear layers with ReLU",))


def test_the_report_ends_with_the_advice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1))
    report = probe(model, nn.functional.mse_loss, [(torch.rand(8, 4), torch.rand(8, 1))])
    assert report.kinds == ("linear layers with sigmoid",)
    assert " ".join(str(report).split()).endswith(report.advice)
    assert (ROOT / PAGE).exists()


def test_every_kind_that_is_recognized_has_been_measured() -> None:
    kinds = {kind for _, found in MODELS.values() for kind in found} | {"linear layers with ReLU"}
    assert kinds == {*module._evidence()}
