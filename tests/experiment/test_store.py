"""A results folder that was damaged by hand or by a crash: one error with a remedy that works, and no run is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcentral.experiment import ResultsError, Task, compare
from gradcentral.experiment.probing import read_probe
from gradcentral.experiment.report import _figures
from gradcentral.experiment.store import FILES, Run
from gradcentral.json_lines import read_lines

DEEP = "[" * 100_000


@pytest.fixture
def finished(tiny: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three finished runs of `tiny`."""
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)
    compare(tiny(), seeds=1, jobs=1, out=tmp_path, progress=False)
    return tmp_path


LINE = {
    "optimizer": "sgd",
    "arm": "none",
    "seed": 0,
    "epochs": [{"epoch": 1, "train_loss": 0.5, "test_metric": 0.5, "data": "hash"}],
    "train_metric": None,
    "diverged_at": None,
    "seconds": 1.5,
    "weights": "hash",
    "environment": {"torch": "2"},
}


def epoch(**changes: Any) -> dict[str, Any]:
    return {"epoch": 1, "train_loss": 0.5, "test_metric": 0.5, "data": "hash"} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": ["sgd"]},
        {"arm": None},
        {"seed": "0"},
        {"seed": True},
        {"seed": [0]},
        {"epochs": None},
        {"epochs": []},
        {"epochs": "two"},
        {"epochs": 2},
        {"epochs": [1, 2]},
        {"epochs": [epoch(test_metric=[0.5])]},
        {"epochs": [epoch(train_loss="low")]},
        {"epochs": [epoch(drift={})]},
        {"epochs": [epoch(data=[])]},
        {"epochs": [epoch(test_metric=10**400)]},
        {"epochs": [epoch(train_loss=None)]},
        {"epochs": [{"epoch": 1, "train_loss": 0.5}]},
        {"train_metric": "high"},
        {"diverged_at": "never"},
        {"seconds": "1"},
        {"seconds": None},
        {"weights": 3},
        {"environment": None},
        {"environment": {"torch": 2}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_line_with_a_wrong_value_is_not_a_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | changes)}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: not a run"):
        read_lines(path, Run.from_line, "run")


def test_an_invalid_line_can_be_deleted_as_the_error_suggests(tiny: Callable[..., Task], finished: Path) -> None:
    path = finished / "results.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"epochs": None})]) + "\n")
    with pytest.raises(ResultsError, match=r"results\.jsonl, line 3: not a run .*delete the line, or .*--no-resume"):
        compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    path.write_text("\n".join(lines) + "\n")
    assert len(compare(tiny(), seeds=1, jobs=1, out=finished, progress=False).all_runs) == 3


def test_a_deeply_nested_line_is_named(tiny: Callable[..., Task], finished: Path) -> None:
    with (finished / "results.jsonl").open("a") as file:
        file.write(f"{DEEP}\n")
    with pytest.raises(ResultsError, match=r"results\.jsonl, line 4: not a run"):
        compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"task": 1}', DEEP])
def test_a_damaged_fingerprint_is_refused_and_no_resume_helps(
    tiny: Callable[..., Task], finished: Path, content: str
) -> None:
    (finished / "task.json").write_text(content)
    with pytest.raises(ResultsError, match=r"task\.json: cannot be read.*--no-resume"):
        compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    assert len(compare(tiny(), seeds=1, jobs=1, out=finished, resume=False, progress=False).all_runs) == 3


@pytest.mark.parametrize("name", ["results.jsonl", "task.json"])
def test_a_folder_in_place_of_a_file_is_refused_and_no_resume_helps(
    tiny: Callable[..., Task], finished: Path, name: str
) -> None:
    (finished / name).unlink()
    (finished / name).mkdir()
    with pytest.raises(ResultsError, match=rf"{name}: cannot be read.*--no-resume"):
        compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    assert len(compare(tiny(), seeds=1, jobs=1, out=finished, resume=False, progress=False).all_runs) == 3


@pytest.mark.parametrize("content", ["null", "[]", '{"layers": ["text"]}', '{"layers": null}', DEEP])
def test_a_damaged_probe_is_ignored(finished: Path, content: str) -> None:
    (finished / "probe.json").write_text(content)
    assert read_probe(finished / "probe.json") is None


def test_a_probe_with_a_wrong_value_is_ignored(finished: Path) -> None:
    path = finished / "probe.json"
    assert read_probe(path) is not None
    stored = json.loads(path.read_text())
    stored["layers"][0]["effects"][0][0] = "large"
    path.write_text(json.dumps(stored))
    assert read_probe(path) is None


def test_a_last_line_without_its_newline_is_kept(tiny: Callable[..., Task], finished: Path) -> None:
    path = finished / "results.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    assert path.read_bytes() == content  # a repeated run would have other seconds


def test_a_partial_line_that_is_not_the_start_of_a_run_is_refused(tiny: Callable[..., Task], finished: Path) -> None:
    path = finished / "results.jsonl"
    with path.open("a") as file:
        file.write('{"id": 1, "score": 0.91')
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"results\.jsonl, last line: not the start of a line.*delete the line"):
        compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    assert path.read_bytes() == before


def test_a_users_own_numbers_are_read_back(tmp_path: Path) -> None:
    def run(seed: int, arm: str) -> list[dict[str, float]]:
        return [{"epoch": 7, "train_loss": 0.5, "test_metric": 1, "data": 3, "memory": float("nan")}]

    compare(run, seeds=1, jobs=1, out=tmp_path, progress=False)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    again = compare(run, seeds=1, jobs=1, out=tmp_path, progress=False)
    assert [Run.from_line(line) for line in lines] == list(again.all_runs)


def test_the_names_of_all_figures_are_checked_before_the_runs(tiny: Callable[..., Task], finished: Path) -> None:
    result = compare(tiny(), seeds=1, jobs=1, out=finished, progress=False)
    assert {f"{name}.png" for name in _figures(result)} == {name for name in FILES if name.endswith(".png")}
