"""Record files survive kills, restarts and full disks, and hold the records of one run."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcentral.diagnostics.monitor import Monitor
from gradcentral.diagnostics.record import Reading, Record, plot_records
from gradcentral.diagnostics.record_files import RecordFile, read_records
from gradcentral.diagnostics.writers import writers_for
from gradcentral.json_lines import append

NAMES = ("run.jsonl", "run.csv")
REMEDIES = ["another path", "load_state_dict", "step=0"]


def _record(step: int, placement: str | None = "gradient") -> Record:
    layer = Reading(0.25, 2.0, 1.5, 1.0, 0.875, 1e-9, 2e-9, 0.5, 12345.0)
    return Record(step, placement, False, Reading(norm=3.0, drift=0.5), {'a,"b".weight': layer, "c": Reading()})


def _train(steps: int, state: dict[str, Any] | None = None, **arguments: Any) -> Monitor:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **arguments) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.rand(3, 4)).square().sum().backward()
            optimizer.step()
    return monitor


def _append(path: Path, record: Record, name: str | None = None) -> None:
    file = RecordFile(path, name)
    file(record)
    file.close()


@pytest.mark.parametrize("name", NAMES)
def test_records_are_read_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / name
    file = RecordFile(path)
    written = [_record(0), _record(100, None), _record(200, "update")]
    for record in written:
        file(record)
    assert read_records(path) == written


@pytest.mark.parametrize("name", NAMES)
def test_a_monitor_writes_every_record_with_six_digits(name: str, tmp_path: Path) -> None:
    monitor = _train(5, every=2, to=str(tmp_path / name))
    read = read_records(tmp_path / name)
    assert [record.step for record in read] == [0, 2, 4]
    for one, other in zip(read, monitor.records, strict=True):
        assert one.net.norm == pytest.approx(other.net.norm, rel=1e-5)
        assert one.layers["weight"].share == pytest.approx(other.layers["weight"].share, rel=1e-5)


def test_files_are_readable_by_json_and_csv(tmp_path: Path) -> None:
    _train(3, every=1, to=[tmp_path / "run.jsonl", tmp_path / "run.csv"])
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert 0 <= json.loads(lines[0])["layers"]["weight"]["share"] <= 1
    with (tmp_path / "run.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["parameter"]) for row in rows[:3]] == [("0", "weight"), ("0", "(net)"), ("1", "weight")]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_continued_by_its_state_appends(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = _train(5, every=2, to=path).state_dict()
    again = _train(3, state, every=2, to=path)
    assert [record.step for record in again.records] == [6]
    assert [record.step for record in read_records(path)] == [0, 2, 4, 6]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_continued_by_its_step_appends(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _train(5, every=2, to=path)
    _train(3, every=2, to=path, step=5)
    assert [record.step for record in read_records(path)] == [0, 2, 4, 6]
    _train(3, every=2, to=path, step=0)
    assert [record.step for record in read_records(path)] == [0, 2]


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_not_mixed_in_one_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _train(5, every=2, to=path)
    content = path.read_bytes()
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, to=path)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=rf"to: .*{name} has the records of a run, the last of step 4") as caught:
            optimizer.step()
    assert (monitor.step, monitor.records) == (0, [])
    assert path.read_bytes() == content
    assert re.findall(r"another path|load_state_dict|step=0", str(caught.value)) == REMEDIES


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_remedies_for_a_file_of_another_run_work(remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    state = _train(5, every=2, to=path).state_dict()
    if remedy == "another path":
        _train(3, every=2, to=tmp_path / "other.jsonl")
        assert [record.step for record in read_records(path)] == [0, 2, 4]
    elif remedy == "load_state_dict":
        _train(3, state, every=2, to=path)
        assert [record.step for record in read_records(path)] == [0, 2, 4, 6]
    else:
        _train(3, every=2, to=path, step=0)
        assert [record.step for record in read_records(path)] == [0, 2]


@pytest.mark.parametrize("name", NAMES)
def test_named_monitors_share_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    nets = {net: nn.Linear(4, 2) for net in ("generator", "critic")}
    monitors, optimizers = {}, {}
    for net, model in nets.items():
        optimizers[net] = torch.optim.SGD(model.parameters(), lr=0.1)
        monitors[net] = Monitor(model, optimizers[net], every=2, to=path, name=net)
    for _ in range(5):
        for net, model in nets.items():
            optimizers[net].zero_grad()
            model(torch.rand(3, 4)).square().sum().backward()
            optimizers[net].step()
    read = read_records(path)
    assert [(record.name, record.step) for record in read] == [(net, step) for step in (0, 2, 4) for net in nets]
    for net, monitor in monitors.items():
        own = [record.net.norm for record in read if record.name == net]
        assert own == pytest.approx([record.net.norm for record in monitor.records], rel=1e-5)
        monitor.remove()
    _train(3, every=2, to=path, name="critic", step=3)
    steps = [(record.name, record.step) for record in read_records(path)]
    assert [step for net, step in steps if net == "generator"] == [0, 2, 4]
    assert [step for net, step in steps if net == "critic"] == [0, 2, 4]
    with pytest.raises(ValueError, match="has the records of a run, the last of step 4"):
        _train(3, to=path, name="critic")
    _train(1, to=path, name="another")
    with pytest.raises(ValueError, match="records: of several monitors, 'generator', .*; plot those of one") as caught:
        plot_records(read)
    chosen = eval(str(caught.value).partition("plot those of one: ")[2], {"records": read})
    assert len(plot_records(chosen).axes[0].lines[0].get_xdata()) == 3


class FullDisk:
    """Replaces `append` by one that writes half of the text, and raises an exception, while ``full``."""

    def __init__(self) -> None:
        self.full = False

    def __call__(self, path: Path, text: str) -> None:
        append(path, text[: len(text) // 2] if self.full else text)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("missing", [0, 2])
def test_a_full_disk_is_one_warning_and_writing_resumes(
    missing: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk()
    monkeypatch.setattr("gradcentral.diagnostics.record_files.append", disk)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1, to=tmp_path / name)

    def train(steps: int) -> None:
        for _ in range(steps):
            model(torch.rand(3, 4)).square().sum().backward()
            optimizer.step()

    train(missing)
    disk.full = True
    with pytest.warns(UserWarning, match="to: .* was not written .*No space left on device") as caught:
        train(2)
    assert len(caught) == 1
    assert f"the record of step {missing} was" in str(caught[0].message)
    assert [record.step for record in read_records(tmp_path / name)] == [*range(missing)]
    disk.full = False
    with pytest.warns(UserWarning, match=f"again from step {missing + 2} on; the 2 before it are missing there"):
        train(1)
    train(1)
    monitor.remove()
    assert [record.step for record in monitor.records] == [*range(missing + 4)]
    written = [*range(missing), missing + 2, missing + 3]
    read = read_records(tmp_path / name)
    assert [record.step for record in read] == written
    assert [record.net.norm for record in read] == pytest.approx(
        [monitor.records[step].net.norm for step in written], rel=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_removed_is_started_again(name: str, tmp_path: Path) -> None:
    file = RecordFile(tmp_path / name)
    file(_record(0))
    (tmp_path / name).unlink()
    file(_record(100))
    assert read_records(tmp_path / name) == [_record(100)]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_missing_at_the_first_step_does_not_stop_the_training(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1, to=folder / name)
    shutil.rmtree(folder)
    model(torch.rand(3, 4)).square().sum().backward()
    with pytest.warns(UserWarning, match="could not be opened .*No such file or directory") as caught:
        optimizer.step()
    assert len(caught) == 1
    folder.mkdir()
    with pytest.warns(UserWarning, match="written again from step 1 on; the 1 before it are missing"):
        optimizer.step()
    monitor.remove()
    assert [record.step for record in read_records(folder / name)] == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RecordFile(tmp_path / "run.jsonl")
    file(_record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as a forked process would see
        with pytest.raises(RuntimeError, match="create the Monitor in this one"):
            file(_record(100))
    file(_record(200))
    assert read_records(tmp_path / "run.jsonl") == [_record(0), _record(200)]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_replaces_the_records_after_its_checkpoint(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _train(9, every=2, to=path)
    _train(2, every=1, to=path, step=3)
    assert [record.step for record in read_records(path)] == [0, 2, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_partial_record_of_a_killed_run_is_dropped(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _append(path, _record(0))
    whole = path.read_bytes()
    _append(path, _record(100))
    both = path.read_bytes()
    for length in range(len(whole), len(both), 7):
        path.write_bytes(both[:length])
        assert read_records(path) == [_record(0)]
        _append(path, _record(200))
        assert read_records(path) == [_record(0), _record(200)]
        path.write_bytes(both[:length])
        _append(path, _record(100))
        assert read_records(path) == [_record(0), _record(100)]


def test_rows_of_a_partial_record_are_not_added_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    _append(path, Record(0, None, False, Reading(), {"gone": Reading(share=0.5)}))
    path.write_bytes(path.read_bytes()[:-3])
    _append(path, _record(100))
    assert read_records(path) == [_record(100)]


def test_a_partial_header_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("step,na", encoding="utf-8")
    _append(path, _record(0))
    assert read_records(path) == [_record(0)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.jsonl", "not json\n"),
        ("run.jsonl", '{"step": 1}\n'),
        ("run.jsonl", "[1, 2]\n"),
        ("run.csv", "epoch,loss\n1,2\n"),
        ("run.csv", "\xff\n"),
    ],
)
def test_a_file_with_other_contents_raises_and_is_not_changed(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1") + b"tail")
    with pytest.raises(ValueError, match=rf"{name}, line 1: not a record of Monitor .* give another path"):
        writers_for(path)
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
    assert path.read_bytes() == content.encode("latin-1") + b"tail"
    assert writers_for(tmp_path / f"another{path.suffix}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.jsonl", '{"precious": 1}'),
        ("run.jsonl", '{"step": 1, "loss": 0.5}'),
        ("run.jsonl", '{"step": 1, "placement": "last"}'),
        ("run.jsonl", '{"step": 1, "lo'),
        ("run.jsonl", "7"),
        ("run.csv", "a,b,c"),
        ("run.csv", "step,placement,skipped,parameter,loss"),
        ("run.csv", "1,2"),
    ],
)
def test_a_partial_line_of_other_contents_raises_and_is_not_changed(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}, line 1: not a record of Monitor .* give another path"):
        writers_for(path)
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("name", NAMES)
def test_a_partial_first_record_is_rewritten(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _append(path, _record(120))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_records(path) == []
        _append(path, _record(0))
        assert read_records(path) == [_record(0)]


def test_an_unknown_suffix_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to: .*run.json: a file .* must end in .jsonl or .csv, not") as caught:
        writers_for(tmp_path / "run.json")
    with pytest.raises(ValueError, match="must end in .jsonl or .csv"):
        read_records(tmp_path / "run.txt")
    assert not list(tmp_path.iterdir())
    for suffix in re.findall(r"\.jsonl|\.csv", str(caught.value)):
        assert len(writers_for(tmp_path / f"run{suffix}")) == 1
