"""docs/compatibility.md lists what the measurements find. Versions may differ; an optimizer's verdict may not."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradcentral
from tests.integrations.compatibility import Case, measure
from tests.integrations.compatibility_page import (
    INTRODUCTION,
    PAGE,
    SIGNS,
    measure_library,
    section,
    sections_of_page,
)
from tests.integrations.optimizer_lists import DISTRIBUTIONS, LIBRARIES

pytest.importorskip("pytorch_optimizer", reason="needs libraries of optimizers: run `make trainers`")
WRITE = "run .venv-trainers/bin/python -m tests.integrations.compatibility_page and read what it changes"


def test_introduction() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(INTRODUCTION), WRITE


@pytest.mark.timeout(1200)  # a library has up to 139 optimizers
@pytest.mark.parametrize("library", LIBRARIES)
def test_library(library: str) -> None:
    pytest.importorskip(library, reason=f"needs {DISTRIBUTIONS[library]}: run `make trainers`")
    outcomes, signs = measure_library(library)
    without_version = re.compile(rf"(?<=^## {library} ).*")
    written = sections_of_page()
    measured, on_page = section(library, outcomes), written.get(library, "")
    assert without_version.sub("", measured) == without_version.sub("", on_page), WRITE
    for name, numbers in signs.items():
        row = next((line for line in written["Sign"].splitlines() if line.startswith(f"| {name} |")), "")
        found = [float(text.rstrip("%")) for text in re.findall(r"[\d.]+%?(?= \|)", row)]
        assert found == pytest.approx([100 * numbers[0], *numbers[1:]], abs=0.05, rel=0.2), WRITE


def test_text_on_sign_optimizers() -> None:
    assert sections_of_page()["Sign"].startswith(SIGNS.strip()), WRITE


class _Unaffected(torch.optim.SGD):
    """An optimizer whose step uses a copy of the gradients from before the step hooks."""

    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)  # type: ignore[arg-type]
        for p in (p for group in self.param_groups for p in group["params"]):
            p.register_post_accumulate_grad_hook(self._keep)
        self.kept: dict[torch.Tensor, torch.Tensor] = {}

    def _keep(self, p: torch.Tensor) -> None:
        assert p.grad is not None
        self.kept[p] = p.grad.clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, gradient in self.kept.items():
            p.sub_(gradient, alpha=0.1)


def test_the_measurement_finds_an_optimizer_that_is_not_centered() -> None:
    found = measure(Case("kept", lambda model, **options: _Unaffected(model.parameters(), **options)))
    assert not found.problem
    assert found.placements["gradient"] != "works"
    assert found.placements["update"] == "works"


def test_lomo_is_centered_in_backward() -> None:
    """LOMO changes the weights in ``backward``, without a step."""
    from pytorch_optimizer import LOMO

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    before = [p.detach().clone() for p in model.parameters()]
    gradcentral.centralize_in_backward(model)
    optimizer = LOMO(model)
    for _ in range(4):
        loss = cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,)))
        optimizer.fused_backward(loss, lr=0.1)
    for p, start in zip(model.parameters(), before, strict=True):
        moved = p.detach() - start
        assert moved.abs().max() > 1e-4
        if p.ndim > 1:
            assert moved.mean(1).abs().max() < 1e-7
