"""Evaluation: the metric of a whole test set, joined outputs and targets, and tests that leave the model as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcentral.experiment import Task, TaskError
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.evaluation import join, number

compare = functools.partial(compare_loudly, progress=False, seeds=1, jobs=1, arms=["none", "gradient"])


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)


def rmse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean().sqrt()


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def test_a_metric_that_is_no_mean_is_that_of_the_test_set(tiny: Callable[..., Task], tmp_path: Path) -> None:
    models = []

    def model() -> nn.Module:
        models.append(nn.Linear(6, 2))
        return models[-1]

    x = torch.rand(60, 6)
    data = TensorDataset(x, torch.linspace(0, 9, 120).view(60, 2))
    task = tiny(model=model, train=data, test=data, metric=rmse, batch_size=3)
    run = compare(task, out=tmp_path).runs("sgd", "gradient")[0]
    with torch.no_grad():
        whole = float(rmse(models[-1](x), data.tensors[1]))
    assert run.final("test_metric") == pytest.approx(whole, rel=1e-5)
    assert run.train_metric == pytest.approx(whole, rel=1e-5)


def test_a_metric_per_batch_is_the_mean_over_the_examples(tiny: Callable[..., Task], tmp_path: Path) -> None:
    sizes = []

    def counted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        sizes.append(len(target))
        return mse(output, target)

    result = compare(tiny(metric=counted, metric_per_batch=True, batch_size=3), out=tmp_path)
    assert sizes[-2:] == [12, 8]  # 20 examples, 4 times 3 at once
    run = result.all_runs[-1]
    assert run.final("test_metric") == pytest.approx(run.final("test_loss"))


class Output(NamedTuple):
    logits: torch.Tensor
    scale: torch.Tensor
    extra: None


def test_outputs_and_targets_of_every_form_are_joined() -> None:
    one, two = torch.rand(3, 2), torch.rand(2, 2)
    both = torch.cat([one, two])
    sizes = [3, 2]
    assert torch.equal(join("output", [one, two], sizes), both)
    joined = join("output", [Output(one, torch.tensor(1.0), None), Output(two, torch.tensor(2.0), None)], sizes)
    assert isinstance(joined, Output)
    assert torch.equal(joined.logits, both)
    assert joined.scale.tolist() == [1, 2]
    assert joined.extra is None
    mapping = join("target", [{"x": one, "id": ["a", "b", "c"]}, {"x": two, "id": ["d", "e"]}], sizes)
    assert torch.equal(mapping["x"], both)
    assert mapping["id"] == [*"abcde"]
    hidden = torch.rand(4, 3, 5), torch.rand(4, 2, 5)  # layers first, so that batches cannot be concatenated
    joined = join("output", [(one, hidden[0]), (two, hidden[1])], sizes)
    assert torch.equal(joined[0], both)
    boxes = [{"boxes": torch.rand(n, 4)} for n in (1, 3, 2, 5)]
    assert join("target", [boxes[:2], boxes[2:]], [2, 2]) == boxes
    ragged = [torch.rand(n) for n in (1, 3, 2, 5)]
    assert join("target", [tuple(ragged[:2]), tuple(ragged[2:])], [2, 2]) == ragged
    padded = join("target", [{"ids": one, "label": one[:, 0]}, {"ids": torch.rand(2, 7), "label": two[:, 0]}], sizes)
    assert torch.equal(padded["label"], both[:, 0])
    with pytest.raises(AttributeError, match="no 'argmax', because .*or set metric_per_batch=True"):
        padded["ids"].argmax()
    with pytest.raises(TaskError, match=r"the outputs of the test batches have the shapes \(3, 2\) and \(2, 5\)"):
        join("output", [one, torch.rand(2, 5)], sizes)


def test_an_output_of_transformers_stays_one() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="needs transformers: run `make trainers`")
    one, two = (outputs.SequenceClassifierOutput(loss=torch.tensor(1.0), logits=torch.rand(n, 2)) for n in (3, 2))
    joined = join("output", [one, two], [3, 2])
    assert torch.equal(joined.logits, torch.cat([one.logits, two.logits]))


def test_the_remedy_for_outputs_of_different_shapes_works(tiny: Callable[..., Task], tmp_path: Path) -> None:
    lengths = [2] * 16 + [5] * 4

    def collate(examples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(examples)
        return x.repeat_interleave(lengths[0] if len(x) == 16 else 3, 1), y

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.scale(x[:, :6]).repeat(1, x.shape[1] // 6)
            return output

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.square().mean()

    options: dict[str, Any] = {"model": Repeats, "collate": collate, "loss": loss, "metric": loss, "batch_size": 4}
    with pytest.raises(TaskError, match="or set metric_per_batch=True"):
        compare(tiny(**options), out=tmp_path / "whole")
    assert len(compare(tiny(**options, metric_per_batch=True), out=tmp_path / "batches").all_runs) == 2


@pytest.mark.parametrize("value", [0.5, torch.tensor([[0.5]]), torch.tensor(0.5, requires_grad=True), True, "0.5"])
def test_a_single_number_is_accepted(value: Any) -> None:
    assert number("metric", value) in (0.5, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"metric: must return a single number, not a Tensor of shape \(3,\); return its mean\(\)"),
        (torch.ones(3).numpy(), r"metric: must return a single number, not a ndarray of shape \(3,\); return its mean"),
        (None, "metric: must return a single number, not a NoneType$"),
        ([0.5], "metric: must return a single number, not a list$"),
    ],
)
def test_anything_else_is_refused_before_any_run(
    tiny: Callable[..., Task], tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        compare(tiny(metric=lambda output, target: value), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if hasattr(value, "mean"):
        assert number("metric", value.mean()) == 1


def test_a_table_that_the_model_makes_while_testing_can_be_used_in_training(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 2)
            self.table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.inner(x)
            if self.table is None or len(self.table) < len(x):  # tests take four times the batch
                self.table = torch.cos(torch.arange(len(x) * 8.0).view(len(x), 8))
            output: torch.Tensor = self.outer(hidden * self.table[: len(x)])
            return output

    assert len(compare(tiny(model=Rotary, batch_size=4), out=tmp_path).all_runs) == 2


def late(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


class Frozen(nn.Module):
    """A model whose only parameters are biases, which have nothing to center."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2] + self.bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schedule": late},
            "schedule: the step of ReduceLROnPlateau requires metrics, but a Task steps once per batch",
        ),
        ({"model": Frozen}, r"optimizers\['sgd'\], arm 'gradient': .*nothing is left to center"),
        ({"loss": lambda output, target: 0.5}, "loss: must return a scalar tensor, not a float"),
    ],
)
def test_what_no_run_can_do_is_refused_before_any_run(
    tiny: Callable[..., Task], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        compare(tiny(**change), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_schedule_that_an_error_suggests_works(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="use another schedule, such as ") as caught:
        compare(tiny(schedule=late), out=tmp_path / "out")
    suggested = str(caught.value).partition("such as ")[2].partition(", or write")[0]

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        names = {"CosineAnnealingLR": torch.optim.lr_scheduler.CosineAnnealingLR, "optimizer": optimizer}
        return eval(suggested, names | {"steps": steps})

    assert len(compare(tiny(schedule=schedule), out=tmp_path / "out").all_runs) == 2


# Numbers that are not finite.


def undefined(output: torch.Tensor, target: torch.Tensor) -> float:
    return float("nan")


def test_a_metric_that_is_not_finite_is_no_divergence(tiny: Callable[..., Task], tmp_path: Path) -> None:
    for metric in (undefined, lambda output, target: float("inf")):
        result = compare(tiny(metric=metric), seeds=2, out=tmp_path / str(metric))
        assert all(run.diverged_at is None and len(run.epochs) == 2 for run in result.all_runs)
        assert "is not finite in 2 of 2 pairs, no pair can be compared" in result.verdicts[0].sentence
        assert result.verdicts[0].outcome == "inconclusive"
        assert result.row("sgd", "none").diverged == 0
        assert result.row("sgd", "none").test_metric == []
        assert "is not finite in 4 runs: sgd, none, seed 0; " in result.notes[0]


def test_pairs_with_a_defined_metric_are_judged(tmp_path: Path) -> None:
    def run(seed: int, arm: str) -> Iterator[dict[str, float]]:
        metric = float("nan") if (arm, seed) == ("gradient", 1) else 0.5 + 0.1 * (arm != "none") * (1 + seed / 10)
        yield {"train_loss": float("inf") if (arm, seed) == ("none", 2) else 1.0, "test_metric": metric}

    result = compare(run, seeds=5, out=tmp_path)
    evidence = result.verdicts[0].evidence
    assert (evidence.diverged, evidence.baseline_diverged, evidence.undefined, evidence.pairs) == (0, 1, 1, 5)
    assert len(evidence.differences) == 3
    assert result.verdicts[0].sentence.startswith(
        "0 of 5 runs diverged (without GC: 1) and metric is not finite in 1 of 5 pairs; of the other pairs, better: "
    )


def test_a_custom_trainers_other_numbers_may_be_undefined(tmp_path: Path) -> None:
    numbers = {"train_loss": 1.0, "test_metric": 0.5, "train_metric": float("nan"), "my_number": float("-inf")}
    result = compare(lambda seed, arm: [numbers, numbers], out=tmp_path)
    assert all(run.diverged_at is None and run.train_metric is None for run in result.all_runs)


# Seeds with equal initial weights.


def test_seeds_with_equal_initial_weights_are_noted(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 2)

    result = compare(tiny(model=model), seeds=3, out=tmp_path / "own")
    assert result.notes[0].startswith("All 3 seeds start from the same weights (a pretrained model, or a factory that")
    assert "note: All 3 seeds start from the same weights" in str(result)
    assert compare(tiny(), seeds=3, out=tmp_path / "different").notes == ()


def test_some_seeds_with_equal_initial_weights_are_listed(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def model() -> nn.Module:
        seed = torch.initial_seed()
        torch.manual_seed(0 if seed in (0, 2) else seed)
        return nn.Linear(6, 2)

    assert (
        compare(tiny(model=model), seeds=4, out=tmp_path).notes[0].startswith("Seeds 0, 2 start from the same weights")
    )
