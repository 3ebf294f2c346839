"""Worker processes: they end with the process that started them, and errors in them are reported as what they are."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gradcentral.experiment import RunError
from gradcentral.experiment import compare as compare_loudly

compare = functools.partial(compare_loudly, progress=False)

ENDLESS = """
import os, pathlib, time

def task(seed, arm):
    pathlib.Path(__file__).with_name(f"worker-{os.getpid()}").touch()
    while True:
        time.sleep(0.01)
        yield {"train_loss": 0.5, "test_metric": 1}
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: int) -> None:
    if number != signal.SIGKILL and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the signal is ignored, as under nohup")
    path, temporary = tmp_path / "endless.py", tmp_path / "temporary"
    path.write_text(ENDLESS)
    temporary.mkdir()
    code = f"from gradcentral.experiment import compare; compare({str(path)!r}, seeds=1, jobs=2, out={str(tmp_path)!r})"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environment)
    wait_until(lambda: len([*tmp_path.glob("worker-*")]) == 2)
    workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
    assert [*temporary.glob("gradcentral-*/epochs.jsonl")]
    process.send_signal(number)
    assert process.wait() == -number
    wait_until(lambda: not any(map(is_running, workers)))
    assert not any(map(is_running, workers))
    assert not [*temporary.glob("gradcentral-*")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


RAISES = """
class Unprintable(Exception):
    def __str__(self):
        raise ZeroDivisionError

def task(seed, arm):
    raise {}
"""


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("exception", "message"),
    [
        ("Unprintable", "Unprintable: its message cannot be formatted, because __str__ raises ZeroDivisionError"),
        ("SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_exception_is_reported_as_what_it_is(tmp_path: Path, exception: str, message: str, jobs: int) -> None:
    path = tmp_path / "raises.py"
    path.write_text(RAISES.format(exception))
    with pytest.raises(RunError) as caught:
        compare(path, seeds=1, jobs=jobs, out=tmp_path / "out")
    assert f"{message} ({path}, line 7)" in str(caught.value)
    assert exception.partition("(")[0] in (tmp_path / "out" / "error.txt").read_text()


def test_the_error_of_a_run_is_raised_even_if_its_traceback_cannot_be_written(tmp_path: Path) -> None:
    path, out = tmp_path / "raises.py", tmp_path / "out"
    path.write_text(RAISES.format("KeyError"))

    def error() -> str:
        with pytest.raises(RunError) as caught:
            compare(path, seeds=1, jobs=1, out=out)
        return str(caught.value)

    assert str(out / "error.txt") in error()
    (out / "error.txt").unlink()
    (out / "error.txt").mkdir()
    assert error().endswith("raises.py, line 7)")


def test_a_missing_temporary_folder_is_reported_and_one_job_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def task(seed, arm):\n    yield {'train_loss': 0.5, 'test_metric': 1}\n")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(RunError, match="no temporary folder can be created .*; use jobs=1"):
        compare(path, seeds=1, jobs=2, out=tmp_path / "out")
    assert len(compare(path, seeds=1, jobs=1, out=tmp_path / "out").all_runs) == 3
