"""torchvision: detection and segmentation models train as in a loop that centers by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from tests.integrations.hand_written import center_by_hand, difference, values_of
from tests.integrations.pages import run_page

torchvision: Any = pytest.importorskip("torchvision", reason="needs torchvision: run `make trainers`")
detection, segmentation = torchvision.models.detection, torchvision.models.segmentation

UNTRAINED = {"weights": None, "weights_backbone": None, "num_classes": 3}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
TARGETS = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2


def _detection_loss(model: Any) -> Tensor:
    losses: dict[str, Tensor] = model([*IMAGES], TARGETS)
    return torch.stack([*losses.values()]).sum()


def _segmentation_loss(model: Any) -> Tensor:
    return nn.functional.cross_entropy(model(IMAGES)["out"], torch.zeros(2, 64, 64, dtype=torch.long))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "SSDlite": (lambda: detection.ssdlite320_mobilenet_v3_large(**UNTRAINED), _detection_loss),
    "LR-ASPP": (lambda: segmentation.lraspp_mobilenet_v3_large(**UNTRAINED), _segmentation_loss),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_centering_by_hand(name: str) -> None:
    create, loss = MODELS[name]

    def train(attach: bool, by_hand: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        model = create().train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        if attach:
            handle = gradcentral.centralize(optimizer, model)
            assert not handle.layout.unknown
        loss(model).backward()
        if by_hand:
            center_by_hand(model)
        optimizer.step()  # one step, since rounding grows quickly in these untrained models
        return values_of(model)

    centered = train(attach=True)
    assert difference(centered, train(attach=False, by_hand=True)) < 1e-5
    assert difference(centered, train(attach=False)) > 1e-4


def test_page() -> None:
    names = run_page("torchvision")
    assert max(float(change.flatten(1).mean(1).abs().max()) for change in names["changes"]) < 1e-7
    assert max(float(change.abs().max()) for change in names["changes"]) > 1e-4
