"""The mean of an output embedding over the vocabulary stays fixed, as documented in docs/layouts.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightLayout, center_weights_, weight_layout

STEPS, TOKENS, WIDTH = 30, 200, 16
# Only the output embedding is centered, over the vocabulary.
OVERRIDES: dict[Any, Any] = {"*": None, "lm_head.weight": "[o] i"}


class LanguageModel(nn.Module):
    """An embedding, one layer and an output embedding, tied to the first or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.hidden(self.embedding(tokens)).tanh())
        return logits


def fused(model: LanguageModel, layout: WeightLayout, placement: str) -> torch.optim.Optimizer:
    return gradcentral.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, layout=layout, placement=placement)


def attached(model: LanguageModel, layout: WeightLayout, placement: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    gradcentral.centralize(optimizer, placement=placement, layout=layout)
    return optimizer


def gradients(model: LanguageModel, generator: torch.Generator) -> None:
    # Like words, a few tokens are frequent; otherwise all moments would be alike, and the mean would hardly drift.
    tokens, targets = (TOKENS * torch.rand(2, 32, generator=generator) ** 4).long()
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens), targets).backward()


def drift(weight: Tensor, before: Tensor) -> float:
    """Return the largest change of a mean over the vocabulary, in units of the weights' root mean square."""
    change = (weight.double() - before.double()).mean(0).abs().max()
    return float(change / weight.double().square().mean().sqrt())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [fused, attached])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mean_output_embedding_stays_fixed_under_adamw(
    make: Callable[..., torch.optim.Optimizer], tied: bool, dtype: torch.dtype
) -> None:
    drifts = {}
    for placement in ("update", "gradient"):
        torch.manual_seed(0)
        model = LanguageModel(tied).to(dtype)
        layout = weight_layout(model, overrides=OVERRIDES)
        assert list(layout) == [model.lm_head.weight]
        center_weights_(model, layout)
        before = model.lm_head.weight.detach().clone()
        assert drift(before, torch.zeros_like(before)) < torch.finfo(dtype).eps
        optimizer = make(model, layout, placement)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            gradients(model, generator)
            optimizer.step()
        weight = model.lm_head.weight.detach()
        assert float((weight - before).abs().mean()) > 1e-2
        drifts[placement] = drift(weight, before)
    assert drifts["update"] < STEPS * torch.finfo(dtype).eps
    assert drifts["gradient"] > 1e-2  # Adam's division by √v moves the mean although the gradient is centered


def test_cross_entropy_ignores_the_mean_output_embedding_and_its_gradient_is_centered() -> None:
    model = LanguageModel(tied=False).double()
    gradients(model, torch.Generator().manual_seed(0))
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradcentral.center(gradient, "[o] i"), gradient, rtol=0, atol=1e-16)
    tokens = torch.arange(TOKENS)
    before = model(tokens).log_softmax(-1)
    center_weights_(model, weight_layout(model, overrides=OVERRIDES))
    torch.testing.assert_close(model(tokens).log_softmax(-1), before)


def test_one_override_decides_for_both_uses_of_a_tied_embedding() -> None:
    model = LanguageModel(tied=True)
    assert weight_layout(model).skipped["embedding.weight"].startswith("tied: ")
    for name in ("embedding.weight", "lm_head.weight"):
        layout = weight_layout(model, overrides={name: "[o] i"})
        vectors = layout["lm_head.weight"]
        assert vectors is layout["embedding.weight"]
        assert (vectors.count, vectors.fan_in) == (WIDTH, TOKENS)
