"""`compare` from end to end: paired runs, resuming, refusals, divergence and errors."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset

import gradcentral
from gradcentral.experiment import ArmError, Comparison, CustomTask, ResultsError, RunError, Task, TaskError
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.store import RESULTS, Run, Store

compare = functools.partial(compare_loudly, progress=False)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the report, which has its own tests and takes a second."""
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)


def numbers(result: Comparison) -> list[Any]:
    return [(run.key, run.epochs, run.train_metric, run.weights) for run in result.all_runs]


def test_runs_of_one_seed_are_paired_and_runs_of_two_seeds_are_not(tiny: Callable[..., Task], tmp_path: Path) -> None:
    optimizers = {
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
        "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    }
    result = compare(tiny(optimizers=optimizers), seeds=2, jobs=1, out=tmp_path)
    assert len(result.all_runs) == 2 * 2 * 3
    by_seed = {
        seed: {(run.weights, *(epoch["data"] for epoch in run.epochs)) for run in result.all_runs if run.seed == seed}
        for seed in (0, 1)
    }
    assert all(len(starts) == 1 for starts in by_seed.values())
    assert by_seed[0] != by_seed[1]
    # Every epoch has its own order, and the arms learn different weights.
    assert len({epoch["data"] for epoch in result.all_runs[0].epochs}) == 2
    assert len({run.final("test_metric") for run in result.all_runs if run.optimizer == "adam" and run.seed == 0}) == 3


def test_a_repeated_run_is_bit_identical_in_this_process_and_in_a_worker(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    first = compare(tiny(), seeds=2, jobs=1, out=tmp_path / "one")
    torch.rand(3)
    assert numbers(compare(tiny(), seeds=2, jobs=1, out=tmp_path / "again")) == numbers(first)
    assert numbers(compare(tiny(), seeds=2, jobs=2, out=tmp_path / "workers")) == numbers(first)


def test_the_callers_random_number_generators_are_unchanged(tiny: Callable[..., Task], tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(1).item(), random.random())
    torch.manual_seed(5)
    random.seed(5)
    compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    assert (torch.rand(1).item(), random.random()) == expected


def test_runs_record_losses_metrics_shares_norms_and_drift(tiny: Callable[..., Task], tmp_path: Path) -> None:
    result = compare(tiny(), seeds=2, epochs=3, jobs=1, out=tmp_path)
    run = result.runs("sgd", "gradient")[1]
    assert run.seed == 1
    assert [epoch["epoch"] for epoch in run.epochs] == [1, 2, 3]
    assert all(0 < epoch["share"] < 1 and epoch["train_loss"] > 0 for epoch in run.epochs)
    assert all(0 < epoch["centered_norm"] < epoch["gradient_norm"] for epoch in run.epochs)
    kept, moved = (result.runs("sgd", arm)[1].epochs[-1]["drift"] for arm in ("update", "none"))
    assert kept < 1e-6 < 1e-2 < moved
    assert run.train_metric is not None
    assert run.environment["torch"] == torch.__version__
    assert [Run.from_line(line) for line in (tmp_path / RESULTS).read_text().splitlines()] == list(result.all_runs)
    row = result.row("sgd", "none")
    assert all(epoch is not None and epoch <= 3 for epoch in row.epochs_to_baseline)
    assert row.gap[1] == pytest.approx(
        (result.runs("sgd", "none")[1].final("test_metric") or 0)
        - (  # lower is better
            result.runs("sgd", "none")[1].train_metric or 0
        )
    )
    assert len(result.verdicts) == 2
    assert "sgd: mean ± std of 2 runs" in str(result)
    assert all(verdict.sentence.split(":")[0] in str(result) for verdict in result.verdicts)


def test_regularized_centers_the_weight_decay_too_and_equals_gradient_without_it(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    optimizers = {
        "decayed": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        "decoupled": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    }
    arms = ["none", "gradient", "regularized", "update"]
    result = compare(tiny(optimizers=optimizers), seeds=2, arms=arms, jobs=1, out=tmp_path)
    keys = itertools.product(optimizers, arms)
    losses = {key: [run.epochs[-1]["train_loss"] for run in result.runs(*key)] for key in keys}
    # For SGD, centering g + λw centers the whole change of the weights.
    assert losses["decayed", "regularized"] == pytest.approx(losses["decayed", "update"])
    assert losses["decayed", "regularized"] != pytest.approx(losses["decayed", "gradient"])
    assert losses["decoupled", "regularized"] == losses["decoupled", "gradient"]
    equal = [note for note in result.notes if "identical" in note]
    assert len(equal) == 1
    assert "under decoupled, which has no L2 weight decay" in equal[0]


def test_regularized_is_refused_before_the_runs_if_the_kind_of_weight_decay_is_unknown(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

    task = tiny(optimizers={"own": Own})
    with pytest.raises(TaskError, match="arm 'regularized': .* use placement='update'"):
        compare(task, arms=["none", "regularized"], jobs=1, out=tmp_path)


def test_more_seeds_arms_and_optimizers_add_the_missing_runs(tiny: Callable[..., Task], tmp_path: Path) -> None:
    task = tiny(optimizers={"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "adam": lambda p: torch.optim.Adam(p)})
    compare(task, seeds=1, arms=["none", "gradient"], optimizers=["sgd"], jobs=1, out=tmp_path)
    compare(task, seeds=2, jobs=1, out=tmp_path)
    result = compare(task, seeds=[1], jobs=1, out=tmp_path)
    assert [run.seed for run in result.all_runs] == [1] * 6
    lines = [Run.from_line(line).key for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 12


def test_no_resume_moves_old_results_aside_without_deleting_any(tiny: Callable[..., Task], tmp_path: Path) -> None:
    compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".gradcentral.lock"}
    result = compare(tiny(batch_size=8), seeds=1, jobs=1, out=tmp_path, resume=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "previous-1").iterdir()} == old
    assert len(result.all_runs) == len((tmp_path / RESULTS).read_text().splitlines()) == 3


def test_a_partial_last_line_is_dropped_and_an_invalid_line_is_named(tiny: Callable[..., Task], tmp_path: Path) -> None:
    first = compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    path = tmp_path / RESULTS
    path.write_bytes(path.read_bytes()[:-20])
    assert numbers(compare(tiny(), seeds=1, jobs=1, out=tmp_path)) == numbers(first)
    assert len(path.read_text().splitlines()) == 3
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], lines[2]]) + "\n")
    with pytest.raises(ResultsError, match=r"results\.jsonl, line 2: not a run.*delete the line"):
        compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert numbers(compare(tiny(), seeds=1, jobs=1, out=tmp_path)) == numbers(first)


KILLED = """
import pathlib, time
from gradcentral.experiment import CustomTask
LOG = pathlib.Path(__file__).with_name("log")

def run(seed, arm):
    for epoch in range(3):
        time.sleep(0.03)
        yield {"train_loss": 1 / (epoch + 1), "test_metric": seed + len(arm)}
    with LOG.open("a") as file:
        file.write(f"{arm} {seed}\\n")

task = CustomTask("killed", run)
"""


def test_a_comparison_killed_at_any_moment_keeps_its_finished_runs(tmp_path: Path) -> None:
    path, out = tmp_path / "killed.py", tmp_path / "out"
    path.write_text(KILLED)
    code = f"from gradcentral.experiment import compare; compare({str(path)!r}, seeds=8, jobs=1, out={str(out)!r})"
    results, kept = out / RESULTS, 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while lines(results) < kept + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept + 3 <= lines(results) < 24
        kept = lines(results)
    with results.open("a") as file:
        file.write('{"optimizer": "custom", "arm": "no')
    result = compare(path, seeds=8, jobs=1, out=out)
    assert len(result.all_runs) == lines(results) == 24
    done = Counter((tmp_path / "log").read_text().splitlines())
    # Each kill may come between the end of a run and the writing of its line; only that run is repeated.
    assert len(done) == 24
    assert sum(done.values()) <= 24 + 2


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_second_comparison_in_the_same_folder_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(ResultsError, match="another comparison is using this folder"):
        compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    compare(tiny(), seeds=1, jobs=1, out=tmp_path)


def test_divergence_is_a_result_not_an_error(tiny: Callable[..., Task], tmp_path: Path) -> None:
    task = tiny(optimizers={"sgd": lambda p: torch.optim.SGD(p, lr=1e6)}, model=lambda: nn.Linear(6, 2), epochs=6)
    result = compare(task, seeds=2, jobs=1, out=tmp_path)
    assert all(run.diverged_at is not None for run in result.all_runs)
    assert all(run.final("test_metric") is None for run in result.all_runs)
    assert "2 of 2 runs diverged (without GC: 2), no pair finished" in result.verdicts[0].sentence
    assert "2 of 2 diverged" in str(result)
    for line in (tmp_path / RESULTS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert numbers(compare(task, seeds=2, jobs=1, out=tmp_path)) == numbers(result)


def raising(output: torch.Tensor, target: torch.Tensor) -> float:
    if len(target) < 20:  # the first batch of four times 4 examples, which is tried before the runs
        return 0.0
    raise ValueError("no\nsuch class")


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_error_of_a_tasks_code_is_one_line(tiny: Callable[..., Task], tmp_path: Path, jobs: int) -> None:
    with pytest.raises(RunError) as caught:
        compare(tiny(metric=raising, batch_size=4), seeds=2, jobs=jobs, out=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "ValueError: no such class" in message
    assert "seed " in message
    assert f"{Path(__file__).name}, line {raising.__code__.co_firstlineno + 3}" in message
    assert str(tmp_path / "error.txt") in message
    assert "Traceback" in (tmp_path / "error.txt").read_text()


def exiting(output: torch.Tensor, target: torch.Tensor) -> float:
    return 0.0 if len(target) < 20 else sys.exit(0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_code_that_exits_in_a_run_does_not_end_the_program(
    tiny: Callable[..., Task], tmp_path: Path, jobs: int
) -> None:
    with pytest.raises(RunError, match=r"run sgd, .*SystemExit: 0 .*test_compare\.py, line"):
        compare(tiny(metric=exiting, batch_size=4), seeds=1, jobs=jobs, out=tmp_path)


def broken_data() -> TensorDataset:
    return TensorDataset(torch.rand(4, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda: 3}, "model: the factory must return an nn.Module, not int"),
        ({"model": lambda: nn.Linear(-1, 2)}, "model: RuntimeError"),
        ({"optimizers": {"sgd": lambda p: 3}}, "optimizers['sgd']: the factory must return a torch.optim.Optimizer"),
        ({"optimizers": {"lbfgs": torch.optim.LBFGS}}, "optimizers['lbfgs']: the step of LBFGS requires a closure"),
        ({"schedule": lambda optimizer, steps: None}, "schedule: must return a torch LRScheduler"),
        ({"loss": lambda output, target: (output - target) ** 2}, "loss: must return a scalar tensor"),
        ({"train": broken_data()}, "a batch must be a tuple (input, …, target) or a mapping, not 1 values"),
    ],
)
def test_a_part_of_the_wrong_type_is_named(
    tiny: Callable[..., Task], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        compare(tiny(**change), seeds=1, jobs=1, out=tmp_path)
    assert message in str(caught.value)


def test_a_model_that_the_seed_does_not_determine_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    state = itertools.count()

    def model() -> nn.Module:
        torch.manual_seed(next(state))
        return nn.Linear(6, 2)

    with pytest.raises(TaskError, match="two calls under one seed gave different initial weights"):
        compare(tiny(model=model), seeds=1, jobs=1, out=tmp_path)


def test_runs_that_are_not_paired_are_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    calls = itertools.count()

    def model() -> nn.Module:
        linear = nn.Linear(6, 2)
        if next(calls) >= 5:  # three for the fingerprint, one for the probe, one for the first run
            linear.bias.data += 1
        return linear

    with pytest.raises(ArmError, match=r"runs of seed 0 are not paired: .* different initial weights"):
        compare(tiny(model=model), seeds=1, jobs=1, out=tmp_path)


def test_an_optimizer_that_already_centers_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def centered(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        optimizer = torch.optim.SGD(params, lr=0.1)
        gradcentral.centralize(optimizer, layout=gradcentral.WeightLayout.from_shapes(params))
        return optimizer

    with pytest.raises(ArmError, match="the task's optimizer already centers gradients"):
        compare(tiny(optimizers={"sgd": centered}), seeds=1, jobs=1, out=tmp_path)


def test_the_schedule_steps_once_per_batch(tiny: Callable[..., Task], tmp_path: Path) -> None:
    seen: list[tuple[int, LRScheduler]] = []

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        seen.append((steps, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)))
        return seen[-1][1]

    compare(tiny(schedule=schedule), seeds=1, jobs=1, out=tmp_path)
    *_, one, two, three = [(steps, scheduler.last_epoch) for steps, scheduler in seen]
    assert one == two == three == (6, 6)  # 2 epochs of 3 batches


def test_mixed_precision_on_the_cpu_computes_in_bfloat16(tiny: Callable[..., Task], tmp_path: Path) -> None:
    seen = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(output.dtype)
        return nn.functional.mse_loss(output.float(), target)

    compare(tiny(loss=loss), seeds=1, jobs=1, amp=True, out=tmp_path)
    assert set(seen) == {torch.bfloat16}


def test_a_lazy_model_is_initialized_from_the_data(tiny: Callable[..., Task], tmp_path: Path) -> None:
    task = tiny(model=lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)))
    assert len(compare(task, seeds=1, jobs=1, out=tmp_path).all_runs) == 3


def trainer(seed: int, arm: str) -> Iterator[dict[str, float]]:
    for epoch in range(1, 4):
        yield {"train_loss": 1 / epoch, "test_metric": 0.5 + 0.1 * seed + (arm != "none") * 0.01 * (seed + 1)}


def test_a_users_own_trainer_is_compared(tmp_path: Path) -> None:
    result = compare(trainer, seeds=4, jobs=1, out=tmp_path)
    assert result.task == "trainer"
    assert not result.checked
    assert [v.outcome for v in result.verdicts] == ["better", "better"] or result.verdicts[0].evidence.p is not None
    assert result.verdicts[0].evidence.mean == pytest.approx(0.025)
    for option in ({"epochs": 3}, {"device": "cuda"}, {"amp": True}, {"optimizers": ["sgd"]}):
        with pytest.raises(TaskError, match=f"{next(iter(option))}: a CustomTask has its own trainer"):
            compare(trainer, out=tmp_path, **option)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ([], "run: reported no epoch"),
        ([3], "run: epoch 1 is of type int"),
        ([{"train_loss": 1}], "run: epoch 1 lacks 'test_metric'; it has 'train_loss'"),
        ([{"train_loss": "low", "test_metric": 1}], "run: epoch 1 holds a value that is not a number"),
    ],
)
def test_invalid_reports_of_a_trainer_are_refused(tmp_path: Path, report: list[Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        compare(CustomTask("mine", lambda seed, arm: report), jobs=1, out=tmp_path)


def test_divergence_of_a_users_own_trainer_is_recorded(tmp_path: Path) -> None:
    def run(seed: int, arm: str) -> Iterator[dict[str, float]]:
        yield {"train_loss": 1.0, "test_metric": 1.0}
        yield {"train_loss": float("nan") if arm == "update" else 0.5, "test_metric": 1.0}

    result = compare(run, seeds=2, jobs=1, out=tmp_path)
    assert [run.diverged_at for run in result.runs("custom", "update")] == [2, 2]
    assert [verdict.outcome for verdict in result.verdicts] == ["no change", "diverges more often"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["gradient", "update"]}, "arms: 'none' must be one of them"),
        ({"arms": ["none"]}, "arms: 'none' alone leaves nothing to compare"),
        ({"arms": ["none", "gc"]}, "arms: unknown arm 'gc'; choose from none, gradient, regularized, update"),
        ({"arms": "none"}, "arms: give a list of names"),
        ({"arms": ["none", "update", "update"]}, "arms: give at least one, each once"),
        ({"optimizers": ["lion"]}, "optimizers: unknown optimizer 'lion'; choose from sgd"),
        ({"optimizers": []}, "optimizers: give at least one"),
        ({"seeds": 0}, "seeds: give an integer of at least 1, not 0"),
        ({"seeds": [1, 1]}, "seeds: give a number of seeds, or different integers"),
        ({"seeds": [-1]}, "seeds: give a number of seeds"),
        ({"epochs": 0}, "epochs: give an integer"),
        ({"jobs": 0}, "jobs: give an integer"),
        ({"device": "gpu"}, "device: 'gpu' is not available; choose from cpu"),
    ],
)
def test_an_unusable_option_is_refused_and_named(
    tiny: Callable[..., Task], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        compare(tiny(), out=tmp_path, **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_suggested_arms_and_lists_of_names_work(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="; add ") as caught:
        compare(tiny(), seeds=1, arms=["none"], jobs=1, out=tmp_path)
    suggested = re.findall(r"'(\w+)'", str(caught.value).partition("; add ")[2])
    assert suggested == ["gradient", "update"]
    with pytest.raises(TaskError, match="such as ") as caught:
        compare(tiny(), seeds=1, optimizers="sgd", jobs=1, out=tmp_path)
    optimizers = json.loads(str(caught.value).partition("such as ")[2].replace("'", '"'))
    for arm in suggested:
        result = compare(tiny(), seeds=1, arms=["none", arm], optimizers=optimizers, jobs=1, out=tmp_path)
        assert result.arms == ("none", arm)


def test_a_folder_that_cannot_be_written_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot be written"):
        compare(tiny(), jobs=1, out=tmp_path / "file" / "out")


def test_without_a_terminal_progress_is_one_plain_line_per_run(
    tiny: Callable[..., Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_loudly(tiny(), seeds=1, jobs=1, out=tmp_path)
    shown = capsys.readouterr().out
    assert "1/3  sgd, none, seed 0: mean_absolute_error 0." in shown
    assert "\x1b" not in shown
    compare_loudly(tiny(), seeds=1, jobs=1, out=tmp_path)
    assert capsys.readouterr().out == "3 of 3 runs were finished earlier\n"


def test_the_default_number_of_jobs_is_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradcentral.experiment.workers import default_jobs

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert default_jobs("cpu", 30) == 6
    assert default_jobs("cpu", 4) == 4
    assert default_jobs("cuda:0", 30) == 1


class Mappings(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples as a tokenizer returns them: mappings with the arguments of the model."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": str(index), "inputs": torch.full((6,), index / 20), "labels": torch.tensor([index / 20, 1.0])}


class TakesMappings(nn.Linear):
    def forward(self, name: list[str], inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(inputs)


def test_examples_may_be_mappings(tiny: Callable[..., Task], tmp_path: Path) -> None:
    def loss(output: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        return nn.functional.mse_loss(output, batch["labels"])

    data = Mappings()
    task = tiny(model=lambda: TakesMappings(6, 2), train=data, test=data, loss=loss, metric=loss)
    result = compare(task, seeds=1, jobs=1, out=tmp_path)
    assert result.probe is not None
    assert all(run.diverged_at is None and len(run.epochs) == 2 for run in result.all_runs)


@pytest.mark.parametrize("resume", [True, False])
def test_the_remedies_for_a_folder_with_other_results_work(
    tiny: Callable[..., Task], tmp_path: Path, resume: bool
) -> None:
    compare(tiny(), seeds=1, jobs=1, out=tmp_path / "out")
    with pytest.raises(ResultsError, match="Give another --out to keep both, or --no-resume to move them aside"):
        compare(tiny(epochs=1), seeds=1, jobs=1, out=tmp_path / "out")
    out = tmp_path / ("other" if resume else "out")
    assert len(compare(tiny(epochs=1), seeds=1, jobs=1, out=out, resume=resume).all_runs) == 3


@pytest.mark.parametrize("broken", ["task.json", "results.jsonl"])
def test_unreadable_results_are_refused_and_no_resume_helps(
    tiny: Callable[..., Task], tmp_path: Path, broken: str
) -> None:
    compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    (tmp_path / broken).write_text("not JSON\n")
    with pytest.raises(ResultsError, match=f"{broken}.*--no-resume"):
        compare(tiny(), seeds=1, jobs=1, out=tmp_path)
    assert len(compare(tiny(), seeds=1, jobs=1, out=tmp_path, resume=False).all_runs) == 3


def test_an_optimizer_with_a_closure_can_be_compared_as_a_custom_task(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match="write the training loop yourself as a CustomTask"):
        compare(tiny(optimizers={"lbfgs": torch.optim.LBFGS}), seeds=1, jobs=1, out=tmp_path / "task")

    def run(seed: int, arm: str) -> Iterator[dict[str, float]]:
        torch.manual_seed(seed)
        model, x = nn.Linear(3, 1), torch.rand(8, 3)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        if arm != "none":
            gradcentral.centralize(optimizer, model)

        def closure() -> float:
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return float(loss.detach())

        loss = float(optimizer.step(closure))
        yield {"train_loss": loss, "test_metric": loss}

    result = compare(CustomTask("lbfgs", run), seeds=2, arms=["none", "gradient"], jobs=1, out=tmp_path / "custom")
    assert len(result.all_runs) == 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_bars_follow_the_epochs(
    tiny: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcentral.experiment.progress import Progress

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    result = compare(tiny(), seeds=2, jobs=1, out=tmp_path / "out")
    keys = [run.key for run in result.all_runs]
    file = tmp_path / "epochs.jsonl"
    file.write_text(json.dumps([*keys[1], 1]) + "\n" + '["partial')
    with Progress(keys, result.all_runs[:1], 2, "error", show=True) as progress:
        progress.follow(file)
        progress.epoch(keys[3], 1)
        progress.finished(result.all_runs[2])
    shown = terminal.getvalue()
    assert "1 of 6 runs were finished earlier" in shown
    assert re.search(r"sgd, none .*1/2  error 0\.", shown)
    assert re.search(r"sgd, gradient .*0/2", shown)
    assert re.search(r"all runs .*2/6", shown)
