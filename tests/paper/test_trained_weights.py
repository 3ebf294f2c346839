"""Trained weights from a file, beside the initial ones in figure 3."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradcentral import weight_layout
from gradcentral.experiment import Task, TaskError, load_task
from gradcentral.paper.draw import draw_all
from gradcentral.paper.trained_weights import means_of, read_weights
from tests.experiment.conftest import make_task

ROOT = Path(__file__).parents[2]


def network() -> nn.Module:
    """Return a network whose layers store their weights along different axes."""
    return nn.Sequential(nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 4, 2), nn.Flatten(), nn.Linear(8, 2))


def trained() -> dict[str, Tensor]:
    """Return weights whose means are known: 0.1 in the transposed convolution, 0.01 in the linear layer."""
    state = network().state_dict()
    for name, mean, axes in (("1.weight", 0.1, (0, 2)), ("3.weight", 0.01, (1,))):
        weight = state[name]
        state[name] = weight - weight.mean(axes, keepdim=True) + mean
    return state


def draw(path: Path, out: Path, model: Callable[[], nn.Module] = network, **options: Any) -> list[dict[str, str]]:
    drawn = draw_all(make_task(model=model), out=out, only=["initial-means"], weights=path, progress=False, **options)
    assert drawn.titles == {"initial-means": "tiny: the means of its 6 weight vectors before and after training"}
    with (out / "initial-means.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_means_are_those_of_the_weight_vectors_in_units_of_the_spread() -> None:
    weight = torch.tensor([[1.0, 3.0, -2.0, 4.0], [-2.0, -1.0, 1.0, 0.0]])
    model = nn.Linear(4, 2)
    means = means_of({"weight": weight}, {"weight": weight_layout(model)["weight"]})
    assert means["absolute"].tolist() == [1.5, 0.5]
    sigma = math.sqrt(sum((value - 0.5) ** 2 for value in weight.flatten().tolist()) / 8)
    expected = torch.tensor([1.5, 0.5], dtype=torch.float64) / (sigma / 2)
    torch.testing.assert_close(means["relative"], expected)
    zero = means_of({"weight": torch.zeros(2, 4)}, {"weight": weight_layout(model)["weight"]})
    assert zero["relative"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["trained.pt", "trained.safetensors"])
def test_the_figure_shows_trained_weights_beside_initial_ones(name: str, tmp_path: Path) -> None:
    (save_file if name.endswith("tensors") else torch.save)(trained(), tmp_path / name)
    rows = draw(tmp_path / name, tmp_path / "out")
    bins = {
        scheme: [row for row in rows if row["scheme"] == scheme] for scheme in ("before training", "after training")
    }
    assert [sum(int(row["count"]) for row in found) for found in bins.values()] == [6, 6]
    first, last = (row for row in bins["after training"] if row["count"] != "0")
    assert (first["count"], last["count"]) == ("2", "4")
    assert float(first["log10_mean_from"]) == pytest.approx(-2, abs=1e-3)
    assert float(last["log10_mean_to"]) == pytest.approx(-1, abs=1e-3)
    assert (tmp_path / "out" / "initial-means.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "initial-means.svg").exists()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in trained().items()}


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "state_dict": trained()},
        {"model": prefixed("module."), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        {"loss": torch.tensor(0.5), "state_dict": prefixed("model._orig_mod.")},
        trained() | {"another.weight": torch.ones(3)},
    ],
)
def test_a_state_dict_inside_a_checkpoint_is_found(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    found = read_weights(tmp_path / "checkpoint.pt", weight_layout(network()))
    assert found.keys() == {"1.weight", "3.weight"}
    assert float(found["3.weight"].mean(1).sub(0.01).abs().max()) < 1e-6


def test_a_tied_parameter_may_have_any_of_its_names(tmp_path: Path) -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    save_file({"1.weight": torch.ones(4, 4)}, tmp_path / "tied.safetensors")
    found = read_weights(tmp_path / "tied.safetensors", weight_layout(nn.Sequential(one, two)))
    assert torch.equal(found["0.weight"], torch.ones(4, 4))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in trained().items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("3.weight"), "{} lacks 3.weight of the task's model; it has 1.weight, 1.bias, 3.bias"),
        (dict.fromkeys("abcdefghi", torch.ones(2)), "{} lacks 1.weight of the task's model; it has a, b, c and 6 more"),
        (trained() | {"3.weight": torch.ones(10, 8)}, "3.weight is 10×8 in {}, but 2×8 in the task's model"),
        (trained() | {"3.weight": torch.full((2, 8), torch.nan)}, "3.weight in {} has values that are not finite"),
        (trained() | {"3.weight": torch.ones(2, 8).char()}, "3.weight in {} has dtype torch.int8, which has no mean"),
        ({"epoch": 3}, "{} holds no tensors by name; save model.state_dict()"),
        (torch.ones(3), "{} holds no tensors by name; save model.state_dict()"),
        (network(), "{} is not a file of tensors (UnpicklingError); save model.state_dict()"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"
    torch.save(content, path)
    with pytest.raises(TaskError) as caught:
        draw(path, tmp_path / "out")
    assert str(caught.value).startswith(f"weights: {message.format(path)}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["trained.pt", "trained.safetensors"])
def test_a_file_that_cannot_be_read_is_refused_and_the_suggested_formats_work(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(TaskError, match=f"weights: {re.escape(str(path))} cannot be read: No such file"):
        draw(path, tmp_path / "out")
    path.write_bytes(b"not weights")
    with pytest.raises(TaskError, match="is not a file of tensors") as caught:
        draw(path, tmp_path / "out")
    *_, remedy = str(caught.value).partition("; ")
    assert remedy == (
        "save model.state_dict() with torch.save, or with safetensors in a file that ends in .safetensors"
    )
    torch.save(trained(), tmp_path / "saved.pt")
    save_file(trained(), tmp_path / "saved.safetensors")
    for saved in ("saved.pt", "saved.safetensors"):
        assert draw(tmp_path / saved, tmp_path / "out")


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"state_dict": trained(), "code": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(TaskError, match="is not a file of tensors"):
        draw(tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_weights_without_their_figure_are_refused_and_the_suggestion_works(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "trained.pt")
    task = make_task(model=network)
    options: dict[str, Any] = {"out": tmp_path / "out", "weights": tmp_path / "trained.pt", "progress": False}
    with pytest.raises(TaskError, match="weights: only the figure initial-means shows them; add it to only"):
        draw_all(task, only=["shares"], **options)
    assert list(draw_all(task, only=["shares", "initial-means"], **options).titles) == ["initial-means", "shares"]


def test_the_task_of_crepe_has_the_network_of_torchcrepe() -> None:
    task = load_task(ROOT / "docs" / "results" / "crepe.py")
    assert isinstance(task, Task)
    with torch.device("meta"):
        model = task.model()
    assert model(torch.zeros(2, 1024, device="meta")).shape == (2, 360)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    assert shapes["conv2.weight"] == (128, 1024, 64, 1)
    assert shapes["classifier.weight"] == (360, 2048)
    assert sum(vectors.count for vectors in weight_layout(model).values()) == 2536
