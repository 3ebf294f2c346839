"""The surroundings of a command: encodings, signals, full disks and folders that cannot be written."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcentral import json_lines, startup
from gradcentral.experiment import store
from gradcentral.experiment.probing import probe_task
from tests.cli.test_main import TASK, run

Run = Callable[..., int]
BENCH = ("--models", "tiny CNN", "--optimizers", "SGD", "--dtypes", "f32", "--rounds", "3", "--no-iteration")
COMMANDS = {
    "compare": ("compare", "line.py", "--seeds", "2", "--jobs", "1"),
    "probe": ("probe", "line.py"),
    "figures": ("figures", "--task", "line.py", "--only", "statements", "--seeds", "1"),
    "layout": ("layout", "torch.nn:LSTM(3, 2)"),
    "bench": ("bench", *BENCH, "--seconds", "0.1", "--out", "bench"),
}


@pytest.fixture
def gradcentral(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a command and returns its exit code."""
    return functools.partial(run, monkeypatch)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task file in the working directory."""
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "line.py").write_text(TASK)
    return path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_in_every_encoding(
    line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch, command: str, encoding: str
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert gradcentral(*COMMANDS[command]) == 0
    assert out.buffer.getvalue().decode(encoding)
    assert not err.buffer.getvalue()


def test_signs_that_an_encoding_lacks_are_spelled_out(
    line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        assert gradcentral("probe", "line.py") == 0
        assert gradcentral("probe", "Φ‖–ü.py") == 2
    shown, error = (stream.buffer.getvalue().decode() for stream in streams.values())
    assert "||g||" in shown
    assert "Phi||-?.py: the file does not exist" in error


def test_the_models_that_an_ascii_terminal_shows_can_be_chosen(
    gradcentral: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        assert gradcentral("bench", "--models", "none") == 2
    choices = err.buffer.getvalue().decode().rpartition("choose from ")[2].strip().split(", ")
    assert "4096x11008" in choices
    assert gradcentral("bench", "--models", ",".join(choices), "--dtypes", "none") == 2
    assert "dtypes: unknown dtype" in capsys.readouterr().err


def test_json_keeps_names_in_every_encoding(line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    line.write_text(
        line.read_text().replace("torch.nn.Linear(3, 2)", "torch.nn.ModuleDict({'Φü': torch.nn.Linear(3, 2)})")
    )
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert gradcentral("layout", "line.py", "--json") == 0
    shown = out.buffer.getvalue().decode()
    assert "Φü.weight" in str(json.loads(shown))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(
    line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert gradcentral("probe", "line.py") == 2
    assert capsys.readouterr().err == "gradcentral: the output cannot be written (No space left on device)\n"


def test_a_closed_stdout_is_no_error(line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert gradcentral("probe", "line.py") == 0
        sys.stdout.close()


MEASURES = {
    "probe": "gradcentral.cli.main.probe_task",
    "figures": "gradcentral.paper.draw._statements",
    "bench": "gradcentral.bench.benchmark.interleave",
    "compare": "gradcentral.experiment.run_comparison.run_all",
}
WRITES = {"probe": "probe.png", "figures": "statements.csv", "bench": "bench.md", "compare": "summary.csv"}


@pytest.mark.parametrize("command", MEASURES)
@pytest.mark.parametrize("kind", ["a file", "below a file", "somebody else's"])
def test_an_unusable_folder_is_noticed_before_the_measurements(
    line: Path,
    gradcentral: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: str,
) -> None:
    taken = line.parent / "taken"
    if kind == "somebody else's":
        taken.mkdir()
        (taken / WRITES[command]).write_text("mine")
    else:
        taken.touch()
    out = "taken/below" if kind == "below a file" else "taken"
    with monkeypatch.context() as patch:
        patch.setattr(MEASURES[command], lambda *_, **__: pytest.fail("measured"))
        assert gradcentral(*COMMANDS[command], "--out", out) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(("gradcentral: taken", f"gradcentral: {taken}"))
    assert shown.err.endswith("give another --out\n")
    assert shown.err.count("\n") == 1
    if kind == "somebody else's":
        assert [path.read_text() for path in taken.iterdir()] == ["mine"]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_verdict_is_printed_if_the_disk_is_full_at_the_report(
    line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if "summary.csv" in self.name:
            no_space()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert gradcentral(*COMMANDS["compare"]) == 2
    shown = capsys.readouterr()
    assert "  update: " in shown.out
    assert "Report:" not in shown.out
    assert shown.err.startswith(f"gradcentral: {line.parent / 'runs'}")
    assert "No space left on device); free space" in shown.err
    assert shown.err.count("\n") == 1
    assert gradcentral(*COMMANDS["compare"]) == 0
    shown = capsys.readouterr()
    assert "6 of 6 runs were finished earlier" in shown.out
    assert "Report:" in shown.out


def test_a_disk_that_fills_between_runs_loses_no_finished_run(
    line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, results = json_lines.append, Path("runs", "line", "results.jsonl")

    def full(path: Path, text: str, **options: Any) -> None:
        if results.exists() and results.read_text().count("\n") == 2:
            append(path, text[:30])  # a disk may take the start of a line
            no_space()
        append(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)
        patch.setattr(store, "append", full)
        assert gradcentral(*COMMANDS["compare"]) == 2
        assert "No space left on device); free space" in capsys.readouterr().err
        kept = results.read_text().splitlines()[:2]
        patch.setattr(store, "append", append)
        assert gradcentral(*COMMANDS["compare"]) == 0
    assert "2 of 6 runs were finished earlier" in capsys.readouterr().out
    assert results.read_text().splitlines()[:2] == kept


# Signals.


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
@pytest.mark.parametrize("command", ["probe", "compare"])
def test_a_signal_ends_a_command_with_one_line(
    line: Path,
    gradcentral: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    number: str,
    status: int,
    message: str,
) -> None:
    if not hasattr(signal, number):
        pytest.skip(f"this system has no {number}")
    monkeypatch.setattr("gradcentral.cli.terminal._received", signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MEASURES[command], lambda *_, **__: signal.raise_signal(getattr(signal, number)))
        assert gradcentral(*COMMANDS[command]) == status
    more = "; finished runs are kept, and the same command continues from there" if command == "compare" else ""
    assert capsys.readouterr().err.strip() == f"gradcentral: {message}{more}"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored(line: Path, gradcentral: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    probe = probe_task

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return probe(*arguments, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr("gradcentral.cli.main.probe_task", interrupted)
            assert gradcentral("probe", "line.py") == 0
    finally:
        signal.signal(signal.SIGTERM, before)


SCRIPT = """
import re
import sys
from gradcentral.__main__ import main
if __name__ == '__main__':
    sys.exit(main())
"""


@pytest.mark.parametrize("form", ["-m", "script"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path, form: str) -> None:
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    (script := tmp_path / "gradcentral").write_text(SCRIPT)
    found = str(Path(startup.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, *(["-m", "gradcentral"] if form == "-m" else [str(script)]), "--version"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{found}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (130, "gradcentral: interrupted\n")


def test_ctrl_c_is_unchanged_for_programs_that_import_the_package(tmp_path: Path) -> None:
    code = "import signal, gradcentral; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    for form in (["-c", code, "gradcentral"], [str(tmp_path / "train.py"), "-m", "gradcentral"]):
        (tmp_path / "train.py").write_text(code)
        subprocess.run([sys.executable, *form], check=True)


# First contact.


def test_without_arguments_the_help_is_printed(gradcentral: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradcentral() == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert gradcentral("--help") == 0
    assert capsys.readouterr().out.strip() == shown.out.strip()
    assert all(f"\n  {command} " in shown.out for command in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_fits_80_columns_and_is_not_cut(
    gradcentral: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert gradcentral(*[command] * bool(command), "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert ".." not in shown.replace("[OPTIONS] COMMAND [ARGS]...", "")
