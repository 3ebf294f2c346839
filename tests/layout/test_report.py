"""The report of the layout command: the table, the points to check, and the same as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from gradcentral import WeightLayout, weight_layout
from gradcentral.layout.report import as_json, as_text, points_to_check


class Net(nn.Module):
    """One parameter for each point to check."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.uneven = nn.ConvTranspose2d(4, 4, 3, stride=2)
        self.depth = nn.Conv2d(4, 4, 1, groups=4)
        self.narrow = nn.Linear(2, 8)
        self.raw = nn.Parameter(torch.zeros(4, 3))
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight


def test_surprising_decisions_are_points_to_check() -> None:
    model = Net()
    points = as_text(model, weight_layout(model))
    assert "raw: skipped as unknown (no rule for Net.raw)" in points
    assert f"  from {Net.__module__} import Net; gradcentral.register_layout(Net, " in points
    assert "embed.weight: skipped (tied: " in points
    assert "depth.weight: skipped (fan-in 1" in points
    assert "narrow.weight: centered with fan-in 2" in points
    assert "uneven.weight: centered over the taps of several phases" in points
    assert "up.weight: centered over" not in points


@pytest.mark.parametrize("make", [Net, lambda: nn.ModuleDict({'[a]*"': Net(), "a": nn.Linear(9, 9)})])
def test_options_named_in_the_points_change_the_decision(make: Callable[[], nn.Module]) -> None:
    model = make()
    options = re.findall(
        r"; (weight_layout\(model, .*\)) (?:centers|skips) it", "\n".join(points_to_check(model, weight_layout(model)))
    )
    for option in options:
        layout = eval(option, {"weight_layout": weight_layout, "model": model})
        assert isinstance(layout, WeightLayout)
        assert option not in "".join(points_to_check(model, layout))
    assert len(options) == 4


def test_uneven_phases_are_reported_behind_parametrizations_but_not_for_an_override() -> None:
    model = parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3, stride=2))
    name = "parametrizations.weight.original"
    (point,) = points_to_check(model, weight_layout(model))
    assert point.startswith(f"{name}: centered over the taps of several phases")
    chosen = weight_layout(model, overrides={name: "[i] o [k k]"})
    assert points_to_check(model, chosen) == []


def test_lazy_and_pruned_parameters_are_points_to_check() -> None:
    model = nn.Sequential(nn.LazyLinear(3), prune.l1_unstructured(nn.Linear(4, 3), "weight", 2))
    points = "\n".join(points_to_check(model, weight_layout(model)))
    assert "0.weight" in points
    assert "unknown until the first forward" in points
    assert "1.weight_orig: skipped (pruned" in points


def test_a_plain_model_has_no_points_to_check() -> None:
    model = nn.Linear(9, 5)
    assert points_to_check(model, weight_layout(model)) == []
    assert "To check" not in as_text(model, weight_layout(model))


def test_json_has_the_same_content() -> None:
    model = Net()
    layout = weight_layout(model)
    report = json.loads(json.dumps(as_json(model, layout)))
    by_name = {parameter["name"]: parameter for parameter in report["parameters"]}
    assert by_name["up.weight"]["weight_vectors"] == {
        "count": 16,
        "fan_in": 4,
        "pattern": "[i] o k k",
        "span": [0],
        "view": None,
    }
    assert by_name["up.weight"]["rule"] == "ConvTranspose2d.weight"
    assert by_name["embed.weight"]["aliases"] == ["head.weight"]
    assert by_name["raw"]["unknown"]
    assert by_name["raw"]["suggestion"].startswith("from ")
    assert report["totals"]["centered"] == len(layout)
    assert report["to_check"] == points_to_check(model, layout)
