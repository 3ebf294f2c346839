"""Task files and modules that exit, read arguments, change the folder, or are written in other encodings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.cli.test_main import TASK, run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


COMPARE = ["--seeds", "1", "--jobs", "1", "--out", "out"]


@pytest.mark.parametrize(
    "arguments", [["compare", "line.py"], ["probe", "line.py"], ["figures", "--task", "line.py"], ["layout", "line.py"]]
)
@pytest.mark.parametrize("code", ["0", "'done'", ""])
def test_a_task_file_that_exits_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: str
) -> None:
    path = Path("line.py").resolve()
    path.write_text(f"{TASK}\nimport sys\nsys.exit({code})\n")
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"gradcentral: {path}, line \d+: the file ends the program \(SystemExit.*\n", shown.err)
    guard = re.findall(r"below (if .*:)$", shown.err)[0]
    path.write_text(f"{TASK}\nimport sys\n{guard}\n    sys.exit({code})\n")
    assert run(monkeypatch, "layout", "line.py") == 0


@pytest.mark.parametrize("command", ["compare", "probe", "figures", "layout"])
def test_a_factory_that_exits_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = Path("line.py").resolve()
    path.write_text(TASK.replace("lambda: torch.nn.Linear(3, 2)", "exit"))
    assert run(monkeypatch, command, *(["--task"] if command == "figures" else []), "line.py") == 2
    shown = capsys.readouterr().err
    assert "SystemExit" in shown
    assert shown.count("\n") == 1


def test_a_module_that_exits_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("module_that_exits.py").write_text("import sys\nsys.exit(3)\n")
    assert run(monkeypatch, "layout", "module_that_exits:Net") == 2
    shown = capsys.readouterr().err
    assert "module_that_exits:Net: its code ends the program (SystemExit: 3); remove the exit" in shown
    Path("module_that_exits.py").write_text("def Net():\n    raise SystemExit\n")
    sys.modules.pop("module_that_exits", None)
    assert run(monkeypatch, "layout", "module_that_exits:Net") == 2
    shown += capsys.readouterr().err
    assert shown.count("\n") == 2


def test_a_task_file_may_have_arguments_with_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--rows', type=int, default=20)\n"
    )
    Path("line.py").write_text(parser + "rows = parser.parse_args().rows\n" + TASK.replace("x[:20]", "x[:rows]"))
    assert run(monkeypatch, "layout", "line.py") == 0
    assert sys.argv[0] == "gradcentral"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_task_may_change_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    (tmp_path / "data").mkdir()
    Path("line.py").write_text("import os\nos.chdir('data')\n" + TASK)  # a relative path, for each worker
    assert run(monkeypatch, "compare", "line.py", "--seeds", "1", "--jobs", jobs, "--out", "out") == 0
    assert f"Report: {tmp_path / 'out' / 'report.html'}\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    assert Path.cwd() == tmp_path
    assert run(monkeypatch, "probe", "line.py", "--out", "found") == 0
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "found" / "probe.csv").exists()
    assert run(monkeypatch, "figures", "--task", "line.py", "--only", "operation", "--out", "drawn") == 0
    assert (tmp_path / "drawn" / "operation.png").exists()
    assert not [*(tmp_path / "data").iterdir()]


def test_a_tilde_in_out_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    Path("line.py").write_text(TASK)
    assert run(monkeypatch, "compare", "line.py", *COMPARE[:-1], "~/runs/x") == 0
    assert run(monkeypatch, "probe", "line.py", "--out", "~/probe") == 0
    assert (tmp_path / "home" / "runs" / "x" / "report.html").exists()
    assert (tmp_path / "home" / "probe" / "probe.csv").exists()
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("head", "encoding"),
    [("# Größe", "utf-8-sig"), ("# -*- coding: latin-1 -*-\nNAME = 'Größe'", "latin-1"), ("\r\n# Größe\r\n", "utf-8")],
)
def test_a_task_file_may_have_any_encoding_of_python(monkeypatch: pytest.MonkeyPatch, head: str, encoding: str) -> None:
    Path("line.py").write_bytes(f"{head}\n{TASK}".encode(encoding))
    assert run(monkeypatch, "compare", "line.py", *COMPARE) == 0
    assert run(monkeypatch, "compare", "line.py", *COMPARE) == 0
    function = "\ndef task(seed, arm):\n    yield {'train_loss': 1, 'test_metric': 1}\n"
    Path("line.py").write_bytes(f"{head}\n{function}".encode(encoding))
    assert run(monkeypatch, "compare", "line.py", *COMPARE[:-1], "function") == 0


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_path_need_not_be_utf_8(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], jobs: str
) -> None:
    folder = os.fsdecode(b"caf\xe9")
    Path(folder).mkdir()
    Path(folder, "line.py").write_text(TASK)
    assert run(monkeypatch, "compare", f"{folder}/line.py", "--seeds", "1", "--jobs", jobs, "--out", "out") == 0
    Path(folder, "line.py").write_text("def task(seed, arm):\n    raise ValueError('no')\n")
    assert run(monkeypatch, "compare", f"{folder}/line.py", "--seeds", "1", "--jobs", "1", "--out", "other") == 2
    assert "ValueError: no" in capfd.readouterr().err


UNSPEAKABLE = """
class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no message")

"""


@pytest.mark.parametrize("command", ["compare", "probe", "layout"])
def test_an_exception_without_a_message_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code = f"{UNSPEAKABLE}\ndef broken():\n    raise Unspeakable\n"
    Path("line.py").write_text(code + TASK.replace("lambda: torch.nn.Linear(3, 2)", "broken"))
    assert run(monkeypatch, command, "line.py") == 2
    shown = capsys.readouterr().err
    assert "Unspeakable: its message cannot be formatted, because __str__ raises RuntimeError" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "probe", "layout"])
@pytest.mark.parametrize(("kind", "length"), [("Dataset", 10**10), ("IterableDataset", 10)])
def test_data_that_cannot_be_read_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, kind: str, length: int
) -> None:
    data = f"class Data(torch.utils.data.{kind}):\n    def __len__(self):\n        return {length}\n"
    data += "    def __iter__(self):\n        return iter(())\n\n"
    task = TASK.replace("TensorDataset(x[:20], x[:20, :2])", "Data()").replace("task = Task(", f"{data}task = Task(")
    Path("line.py").write_text(task)
    assert run(monkeypatch, command, "line.py") == 2
    shown = capsys.readouterr().err
    assert "train: " in shown
    assert shown.count("\n") == 1
