"""Output folders: files of somebody else are never changed, and a folder that cannot be written gives one error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gradcentral.experiment import ResultsError, Task, compare
from gradcentral.experiment.output_folder import LIST, OutputFolder
from gradcentral.experiment.store import FILES, LOCK
from gradcentral.paper.draw import draw_all


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", [*FILES, LIST])
@pytest.mark.parametrize("resume", [True, False])
def test_a_comparison_refuses_a_folder_with_somebody_elses_files(
    tiny: Callable[..., Task], tmp_path: Path, name: str, resume: bool
) -> None:
    (tmp_path / name).write_text('{"id": 1, "score": 0.91}')
    before = contents(tmp_path)
    with pytest.raises(ResultsError, match=rf"{name}.*give another --out"):
        compare(tiny(), seeds=1, jobs=1, out=tmp_path, resume=resume, progress=False)
    assert contents(tmp_path) == before


def test_a_comparison_leaves_all_other_files_alone(tiny: Callable[..., Task], tmp_path: Path) -> None:
    others = {"progress-resnet.jsonl": b"a record\n", "thesis.tex": b"", ".gitignore": b"*", ".lock": b"mine"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for resume in (True, False):
        compare(tiny(), seeds=1, jobs=1, out=tmp_path, resume=resume, progress=False)
        found = contents(tmp_path)
        assert others.items() <= found.items()
        assert found.keys() - others.keys() <= {*FILES, LIST, LOCK}
    aside = contents(tmp_path / "previous-1")
    assert not others.keys() & aside.keys()
    assert aside.keys() == {*json.loads(aside[LIST])["files"], LIST}
    # What was moved aside can be continued there.
    compare(tiny(), seeds=2, jobs=1, out=tmp_path / "previous-1", progress=False)
    assert (tmp_path / "previous-1" / "results.jsonl").read_bytes().startswith(aside["results.jsonl"])


def test_figures_refuse_a_folder_with_somebody_elses_files(tiny: Callable[..., Task], tmp_path: Path) -> None:
    (tmp_path / "operation.svg").write_text("mine")
    with pytest.raises(ResultsError, match=r"operation\.svg, not written by gradcentral"):
        draw_all(tiny(), out=tmp_path, only=["operation"], seeds=1, progress=False)
    assert contents(tmp_path) == {"operation.svg": b"mine"}
    for _ in range(2):
        assert draw_all(tiny(), out=tmp_path / "other", only=["operation"], seeds=1, progress=False).titles


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResultsError, match=r"a\.csv"):
        OutputFolder(tmp_path).claim(["a.csv"])


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"files": "a.csv"}', '{"files": [1]}', "[" * 100_000])
def test_a_damaged_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / LIST).write_text(content)
    with pytest.raises(ResultsError, match="is not a list of files written by gradcentral; give another --out"):
        OutputFolder(tmp_path).claim(["a.csv"])
    assert (tmp_path / LIST).read_text() == content


def test_a_failed_write_keeps_the_previous_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(tmp_path)
    folder.claim(["a.csv"])
    folder.write("a.csv", "one\n")

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(ResultsError, match=r"No space left on device\); free space, or give another --out"):
            folder.write("a.csv", "two\n")
    assert contents(tmp_path).keys() == {"a.csv", LIST}
    assert (tmp_path / "a.csv").read_text() == "one\n"
    folder.write("a.csv", "two\n")  # after freeing space
    assert (tmp_path / "a.csv").read_text() == "two\n"


def test_text_is_utf_8_and_a_name_outside_it_is_escaped(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    folder.claim(["a.txt"])
    folder.write("a.txt", "‖Φ‖ \udcff\n")
    assert (tmp_path / "a.txt").read_bytes() == "‖Φ‖ \\udcff\n".encode()


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    OutputFolder("~/out").claim(["a.csv"])
    assert (tmp_path / "out" / LIST).exists()
