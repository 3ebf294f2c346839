"""JSON Lines files: appending, reading, and the partial last line that a killed writer leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradcentral.json_lines import append, drop_partial_line, finish_last_line, read_complete, read_lines


@pytest.mark.parametrize("sync", [False, True])
def test_appended_lines_are_read_back(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, '{"seed": 1}\n', sync=sync)
    append(path, '{"seed": 2}\n{"seed": 3}\n', sync=sync)
    assert read_lines(path, json.loads, "run") == [{"seed": 1}, {"seed": 2}, {"seed": 3}]


def test_a_partial_last_line_is_ignored_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes('"α"\n"β"'.encode()[:-2])
    assert read_complete(path) == '"α"\n'
    drop_partial_line(path)
    append(path, '"γ"\n')
    assert read_lines(path, json.loads, "run") == ["α", "γ"]


def test_an_error_gives_the_line_number(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, "1\n\n2\n")
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2: not a run \("):
        read_lines(path, json.loads, "run")


@pytest.mark.parametrize(
    ("last", "kept", "left"),
    [
        (b'{"seed": 2}', {"seed": 2}, b'{"seed": 1}\n{"seed": 2}\n'),
        (b'{"seed": ', None, b'{"seed": 1}\n'),
        (b"{", None, b'{"seed": 1}\n'),
    ],
)
def test_a_last_line_is_kept_if_only_its_newline_is_missing(
    tmp_path: Path, last: bytes, kept: object, left: bytes
) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"seed": 1}\n' + last)
    assert finish_last_line(path, json.loads, '{"seed": ') == kept
    assert path.read_bytes() == left


def test_a_partial_line_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"id": ')
    with pytest.raises(ValueError, match="last line: not the start of a line that gradcentral writes"):
        finish_last_line(path, json.loads, '{"seed": ')
    assert path.read_bytes() == b'{"id": '
