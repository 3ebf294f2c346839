"""The command line: what the user can mend is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gradcentral.cli import main as cli

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


def test_compare(task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "compare", "line.py", "--seeds", "2", "--jobs", "1", "--arms", "none,update") == 0
    shown = capsys.readouterr().out
    assert "4/4  sgd, update, seed 1: l1_loss" in shown
    assert "line, sgd: mean ± std of 2 runs" in shown
    assert "  update: " in shown
    assert f"Report: {Path('runs', 'line', 'report.html')}" in shown
    report = task.parent / "runs" / "line" / "report.html"
    assert "seeds=2, arms=[&#39;none&#39;, &#39;update&#39;])" in report.read_text()


def test_probe(task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "probe", "line.py", "--batches", "1", "--out", "found") == 0
    shown = capsys.readouterr().out
    assert "GC removes" in shown
    assert "bias: bias" in shown
    assert (task.parent / "found" / "probe.csv").read_text().startswith("parameter,kind,share")
    assert (task.parent / "found" / "probe.png").stat().st_size > 5_000


def test_figures(task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "figures", "--task", "line.py", "--only", "statements,operation", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert "P² = P: centering twice is centering once" in shown
    folder = Path("runs", "figures-line")
    assert f"{folder / 'operation.png'}  line: what centering does" in shown
    for name in ("operation.png", "operation.svg", "operation.csv", "statements.csv"):
        assert (task.parent / folder / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "none.py"], "the file does not exist"),
        (["probe", "none.py"], "the file does not exist"),
        (["figures", "--task", "line.py", "--only", "shapes"], "only: there is no 'shapes'"),
        (["probe", "line.py", "--device", "toaster"], "device: 'toaster' is not available"),
        (["compare", "digit"], "unknown task 'digit'"),
        (["compare", "line.py", "--arms", "none,gc"], "arms: unknown arm 'gc'; choose from none, gradient, update"),
        (["compare", "line.py", "--arms", "gradient"], "arms: 'none' must be among them"),
        (["compare", "line.py", "--optimizers", "lion"], "optimizers: unknown optimizer 'lion'; choose from sgd"),
        (["compare", "line.py", "--seeds", "many"], "seeds: give a number such as 5, or a list such as 0,3,7"),
        (["compare", "line.py", "--seeds", "0"], "seeds: give a whole number of at least 1"),
        (["compare", "line.py", "--device", "nowhere"], "device: 'nowhere' is not available"),
        (["compare", "line.py", "--jobs", "0"], "jobs: give a whole number of at least 1"),
        (["compare", "line.py", "--epochs", "x"], "epochs"),
        (["compare", "line.py", "--epoch", "3"], "No such option"),
        (["compare", "line.py", "extra"], "unexpected extra argument"),
        (["compar"], "No such command 'compar'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
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


def test_missing_data_and_a_failing_run(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task.write_text("open('digits.csv')\n")
    assert run(monkeypatch, "compare", "line.py") == 2
    error = capsys.readouterr().err
    assert f"gradcentral: {task}, line 1: FileNotFoundError" in error
    task.write_text(TASK.replace("torch.nn.functional.l1_loss", "lambda output, target: 1 / 0"))
    assert run(monkeypatch, "compare", "line.py", "--jobs", "1") == 2
    shown = capsys.readouterr()
    assert "gradcentral: run sgd, none, seed 0: ZeroDivisionError: division by zero" in shown.err
    assert shown.err.count("\n") == 1
    assert "ZeroDivisionError" in (task.parent / "runs" / "line" / "error.txt").read_text()


def test_a_changed_task_is_refused_and_no_resume_goes_on(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "line.py", "--seeds", "1", "--jobs", "1"]
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--epochs", "3") == 2
    assert "epochs (was 2, is 3)" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--epochs", "3", "--no-resume") == 0
    assert (task.parent / "runs" / "line" / "previous-1" / "results.jsonl").exists()


def test_an_interrupt_says_how_to_go_on(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task.write_text("raise KeyboardInterrupt\n")
    assert run(monkeypatch, "compare", "line.py") == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_seeds_are_a_count_or_a_list() -> None:
    for text, seeds in (("2", 2), ("4,", [4]), ("0, 7", [0, 7])):
        assert cli._seeds(text) == seeds


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gradcentral {metadata.version('gradcentral')}\n"


def test_python_m(task: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gradcentral", "compare", "none.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("gradcentral: ")
    assert "Traceback" not in result.stderr
