"""The command line: errors that the user can correct are one line with a remedy, and exit code 2."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

import gradcentral
from gradcentral import __main__ as entry_point
from gradcentral.cli import main as cli
from gradcentral.experiment.task import check_seed_count

TASK = """
import torch
from torch.utils.data import TensorDataset
from gradcentral.experiment import Task

x = torch.linspace(0, 1, 40)[:, None] * torch.ones(3)
task = Task(
    name="line", model=lambda: torch.nn.Linear(3, 2), train=TensorDataset(x[:20], x[:20, :2]),
    test=TensorDataset(x[20:], x[20:, :2]), loss=torch.nn.functional.mse_loss,
    metric=torch.nn.functional.l1_loss, higher_is_better=False, epochs=2,
    optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)},
)
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradcentral", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run()
    return int(caught.value.code or 0)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "line.py"
    path.write_text(TASK)
    return path


def test_compare_trains_and_writes_a_report(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compare", "line.py", "--seeds", "2", "--jobs", "1", "--arms", "none,update") == 0
    shown = capsys.readouterr().out
    assert "4/4  sgd, update, seed 1: l1_loss" in shown
    assert "line, sgd: mean ± std of 2 runs" in shown
    assert "  update: " in shown
    assert f"Report: {task.parent / 'runs' / 'line' / 'report.html'}" in shown
    report = task.parent / "runs" / "line" / "report.html"
    assert "seeds=2, arms=[&#39;none&#39;, &#39;update&#39;])" in report.read_text()


def test_probe_prints_and_writes_the_shares(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "probe", "line.py", "--batches", "1", "--out", "found") == 0
    shown = capsys.readouterr().out
    assert "GC removes" in shown
    assert "bias: bias" in shown
    assert (task.parent / "found" / "probe.csv").read_text().startswith("parameter,kind,share")
    assert (task.parent / "found" / "probe.png").stat().st_size > 5_000


def test_figures_draws_and_writes_what_is_chosen(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "figures", "--task", "line.py", "--only", "statements,operation", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert "P² = P: centering is idempotent" in shown
    folder = Path("runs", "figures-line")
    assert f"{folder / 'operation.png'}  line: the gradient of each weight vector" in shown
    for name in ("operation.png", "operation.svg", "operation.csv", "statements.csv"):
        assert (task.parent / folder / name).stat().st_size > 0


def test_figures_draws_trained_weights(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), task.parent / "trained.pt")
    assert run(monkeypatch, "figures", "--task", "line.py", "--only", "initial-means", "--weights", "trained.pt") == 0
    assert "before and after training" in capsys.readouterr().out
    assert "after training" in (task.parent / "runs" / "figures-line" / "initial-means.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "none.py"], "the file does not exist"),
        (["probe", "none.py"], "the file does not exist"),
        (["figures", "--task", "line.py", "--only", "shapes"], "only: unknown figure 'shapes'"),
        (["probe", "line.py", "--device", "toaster"], "device: 'toaster' is not available"),
        (["compare", "digit"], "unknown task 'digit'"),
        (
            ["compare", "line.py", "--arms", "none,gc"],
            "arms: unknown arm 'gc'; choose from none, gradient, regularized, update",
        ),
        (["compare", "line.py", "--arms", "gradient"], "arms: 'none' must be one of them"),
        (["compare", "line.py", "--optimizers", "lion"], "optimizers: unknown optimizer 'lion'; choose from sgd"),
        (["compare", "line.py", "--seeds", "many"], "seeds: give a number such as 5, or a list such as 0,3,7"),
        (["compare", "line.py", "--seeds", "0"], "seeds: give an integer of at least 1"),
        (
            ["compare", "line.py", "--seeds", "99999999999"],
            "seeds: 99999999999 is a number of seeds, which may be at most",
        ),
        (["figures", "--task", "line.py", "--seeds", "99999999999"], "seeds: 99999999999 is a number of seeds"),
        (["compare", "line.py", "--device", "meta"], "device: 'meta' is not available"),
        (["figures", "--task", "line.py", "--weights", "none.pt"], "none.pt cannot be read: No such file"),
        (["figures", "--task", "line.py", "--device", "nowhere"], "device: 'nowhere' is not available"),
        (["compare", "line.py", "--device", "nowhere"], "device: 'nowhere' is not available"),
        (["compare", "line.py", "--jobs", "0"], "jobs: give an integer of at least 1"),
        (["compare", "line.py", "--epochs", "x"], "epochs"),
        (["compare", "line.py", "--epoch", "3"], "No such option"),
        (["compare", "line.py", "extra"], "unexpected extra argument"),
        (["bench", "--models", "ResNet-51"], "models: unknown model 'ResNet-51'; choose from ResNet-50"),
        (["bench", "--device", "toaster"], "device: unknown device 'toaster'; choose from cpu, cuda"),
        (["compar"], "No such command 'compar'"),
    ],
)
def test_errors_that_the_user_can_correct_are_one_line(
    task: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("gradcentral: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_the_command_that_a_usage_error_suggests_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compar") == 2
    found = re.search(r"See gradcentral (.+)\.$", capsys.readouterr().err)
    assert found is not None
    assert run(monkeypatch, *shlex.split(found[1])) == 0
    assert "compare" in capsys.readouterr().out


def test_probing_a_custom_task_suggests_a_call_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text("from gradcentral.experiment import CustomTask\ntask = CustomTask('own', lambda seed, arm: [])\n")
    assert run(monkeypatch, "probe", str(path)) == 2
    found = re.search(r"call (gradcentral\.probe\(.*?\))", capsys.readouterr().err)
    assert found is not None
    batches = [(torch.randn(4, 3), torch.randn(4, 2))]
    names = {"gradcentral": gradcentral, "model": nn.Linear(3, 2), "loss": nn.functional.mse_loss, "batches": batches}
    assert eval(found[1], names).layers


def test_a_missing_library_is_reported_with_an_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradcentral.cli.main", None)
    with pytest.raises(ModuleNotFoundError):  # a broken installation, not a missing library
        entry_point.main()
    monkeypatch.delitem(sys.modules, "gradcentral.cli.main")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        entry_point.main()
    found = re.search(r"needs (\w+): pip install 'gradcentral\[(\w+)\]'", str(caught.value))
    assert found is not None
    required = metadata.requires("gradcentral") or []
    assert any(line.startswith(found[1]) and f'extra == "{found[2]}"' in line for line in required)


def test_errors_of_the_task_are_reported_with_their_location(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task.write_text("open('digits.csv')\n")
    assert run(monkeypatch, "compare", "line.py") == 2
    error = capsys.readouterr().err
    assert f"gradcentral: {task}, line 1: FileNotFoundError" in error
    task.write_text(TASK.replace("torch.nn.functional.l1_loss", "lambda output, target: 1 / 0"))
    assert run(monkeypatch, "compare", "line.py", "--jobs", "1") == 2
    assert f"ZeroDivisionError: division by zero ({task}, line 10)" in capsys.readouterr().err
    late = "lambda output, target: 1 / float(len(target) < 20)"  # the first batch is tried before the runs
    task.write_text(TASK.replace("torch.nn.functional.l1_loss", late).replace("epochs=2", "epochs=2, batch_size=4"))
    assert run(monkeypatch, "compare", "line.py", "--jobs", "1") == 2
    shown = capsys.readouterr()
    assert "gradcentral: run sgd, none, seed 0: ZeroDivisionError: float division by zero" in shown.err
    assert shown.err.count("\n") == 1
    assert "ZeroDivisionError" in (task.parent / "runs" / "line" / "error.txt").read_text()


def test_a_changed_task_is_rejected_unless_no_resume_is_given(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "line.py", "--seeds", "1", "--jobs", "1"]
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--epochs", "3") == 2
    assert "epochs (was 2, is 3)" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--epochs", "3", "--no-resume") == 0
    assert (task.parent / "runs" / "line" / "previous-1" / "results.jsonl").exists()


def test_the_same_command_continues_after_an_interrupt(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = """
from pathlib import Path

def l1_loss(output, target):
    if Path("interrupt").exists() and Path("runs/line/results.jsonl").exists():
        raise KeyboardInterrupt
    return torch.nn.functional.l1_loss(output, target)
"""
    task.write_text("import torch\n" + metric + TASK.replace("torch.nn.functional.l1_loss", "l1_loss"))
    arguments = ["compare", "line.py", "--seeds", "1", "--jobs", "1"]
    results = task.parent / "runs" / "line" / "results.jsonl"
    (task.parent / "interrupt").touch()
    assert run(monkeypatch, *arguments) == 130
    assert "the same command continues from there" in capsys.readouterr().err
    finished = results.read_text().splitlines()
    (task.parent / "interrupt").unlink()
    assert run(monkeypatch, *arguments) == 0
    assert results.read_text().splitlines()[: len(finished)] == finished
    assert len(finished) == 1


def test_the_seeds_that_an_error_suggests_are_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compare", "--seeds", "many") == 2
    found = re.search(r"such as (\S+), or a list such as (\S+), not", capsys.readouterr().err)
    assert found is not None
    assert [cli._seeds(text) for text in found.groups()] == [5, [0, 3, 7]]
    assert run(monkeypatch, "compare", "--seeds", "20261126") == 2
    shown = capsys.readouterr().err
    found = re.search(r"at most (\d+); a list such as (\[.*?\]) .*command line: (\S+)\)", shown)
    assert found is not None
    assert cli._seeds(found[3]) == eval(found[2])
    check_seed_count(int(found[1]))


def test_seeds_are_a_count_or_a_list() -> None:
    for text, seeds in (("2", 2), ("4,", [4]), ("0, 7", [0, 7])):
        assert cli._seeds(text) == seeds


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gradcentral {metadata.version('gradcentral')}\n"


def test_python_m_runs_the_command_line(task: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gradcentral", "compare", "none.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("gradcentral: ")
    assert "Traceback" not in result.stderr


def test_without_arguments_the_first_steps_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "\n    gradcentral compare --example    write a task file" in shown


@pytest.mark.parametrize("command", ["compare", "probe", "figures", "layout", "bench", "doctor"])
def test_every_command_has_an_example_with_valid_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    example = re.search(r"Example: gradcentral (.*)", " ".join(capsys.readouterr().out.split()))
    assert example is not None
    commands: Any = typer.main.get_command(cli.app)  # a group of a click that is part of typer in newer versions
    name, *arguments = shlex.split(example[1])
    assert name == command
    commands.commands[name].make_context(name, arguments)  # raises for an unknown option or a wrong value


def test_the_example_task_is_written_once_and_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compare", "--example") == 0
    command = re.search(r"run: gradcentral (.*)", capsys.readouterr().out)
    assert command is not None
    (tmp_path / "my_task.py").write_text((tmp_path / "my_task.py").read_text().replace("epochs=20", "epochs=1"))
    assert run(monkeypatch, *command[1].split(), "--seeds", "2", "--jobs", "1", "--optimizers", "adam") == 0
    assert "wine, adam: mean ± std of 2 runs" in capsys.readouterr().out
    edited = (tmp_path / "my_task.py").read_text()
    assert run(monkeypatch, "compare", "--example") == 2
    assert "my_task.py exists already; rename it first" in capsys.readouterr().err
    assert (tmp_path / "my_task.py").read_text() == edited
