"""The layout command: which models it can build, what it shows, and what it tells to look at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gradcentral import weight_layout
from gradcentral.cli.layout import ModelError, as_json, as_text, build_model, points_to_look_at


class Net(nn.Module):
    """Something of everything that deserves a look."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.depth = nn.Conv2d(4, 4, 1, groups=4)
        self.narrow = nn.Linear(2, 8)
        self.raw = nn.Parameter(torch.zeros(4, 3))
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight


def test_models_are_built_on_the_meta_device() -> None:
    model = build_model("torch.nn:Linear(10**6, 10**6)")
    assert isinstance(model, nn.Linear)
    assert model.weight.is_meta


def test_models_that_need_values_are_built_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_of_mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(int(torch.ones(3).sum().item()), 2)\nready = make()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("make", "ready", "make()"):
        model = build_model(f"models_of_mine:{name}")
        assert isinstance(model, nn.Linear)
        assert model.in_features == 3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.nn", "give MODULE:NAME"),
        ("no_such_module:Net", "can't import no_such_module"),
        ("torch.nn:NoSuchLayer", "NameError"),
        ("torch.nn:Linear", "if it needs arguments, write them: MODULE:NAME"),
        ("torch:tensor([1.0])", "is a Tensor; it must be or make a torch.nn.Module"),
        ("no_such_task.py", "the file does not exist"),
    ],
)
def test_what_can_not_be_built_is_said(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(target)
    if not target.endswith(".py"):
        with pytest.raises(ModelError):
            build_model(target)


def test_points_to_look_at() -> None:
    model = Net()
    points = "\n".join(points_to_look_at(model, weight_layout(model)))
    assert "raw: left alone as unknown (no rule for Net.raw)" in points
    assert "to decide, paste and edit: gradcentral.register_layout(" in points
    assert "embed.weight: left alone, overrides={name: WeightVectors(...)} centers it (tied:" in points
    assert "depth.weight: left alone (fan-in 1" in points
    assert "narrow.weight: centered, exclude=[...] leaves it alone (fan-in 2" in points
    assert "up.weight: centered as whole filters (transposed convolution with a stride" in points


def test_lazy_and_pruned_parameters_are_pointed_out() -> None:
    model = nn.Sequential(nn.LazyLinear(3), prune.l1_unstructured(nn.Linear(4, 3), "weight", 2))
    points = "\n".join(points_to_look_at(model, weight_layout(model)))
    assert "0.weight" in points
    assert "not decided yet" in points
    assert "1.weight_orig: left alone (pruned" in points


def test_a_plain_model_has_no_points() -> None:
    model = nn.Linear(9, 5)
    assert points_to_look_at(model, weight_layout(model)) == []
    assert "Have a look" not in as_text(model, weight_layout(model))


def test_json_holds_the_same() -> None:
    model = Net()
    layout = weight_layout(model)
    report = json.loads(json.dumps(as_json(model, layout)))
    by_name = {parameter["name"]: parameter for parameter in report["parameters"]}
    assert by_name["up.weight"]["weight_vectors"] == {"count": 4, "fan_in": 16, "span": [0, 2, 3], "view": None}
    assert by_name["up.weight"]["rule"] == "ConvTranspose2d.weight"
    assert by_name["embed.weight"]["aliases"] == ["head.weight"]
    assert by_name["raw"]["unknown"]
    assert by_name["raw"]["suggestion"].startswith("gradcentral.register_layout")
    assert report["totals"]["centered"] == len(layout)
    assert report["look_at"] == points_to_look_at(model, layout)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradcentral", "layout", *arguments], capture_output=True, text=True, check=False
    )


def test_command() -> None:
    pytest.importorskip("typer", reason="the command line needs typer: pip install 'gradcentral[experiments]'")
    shown = _command("torch.nn:Transformer(8, 2, 1, 1, 8)")
    assert shown.returncode == 0
    assert "MultiheadAttention.in_proj_weight" in shown.stdout
    report = json.loads(_command("torch.nn:Linear(9, 2)", "--json").stdout)
    assert report["totals"]["elements"] == 20
    assert "no convolution" in _command("torch.nn:Linear(9, 2)", "--only", "conv").stdout
    failed = _command("torch.nn:Linear")
    assert failed.returncode == 2
    assert failed.stderr.startswith("gradcentral: torch.nn:Linear: TypeError")


def test_command_on_a_task() -> None:
    pytest.importorskip("typer", reason="the command line needs typer: pip install 'gradcentral[experiments]'")
    shown = _command(str(Path(__file__).parent / "data" / "layout_task.py"))
    assert shown.returncode == 0, shown.stderr
    assert "2 of 4 parameters are centered" in shown.stdout
