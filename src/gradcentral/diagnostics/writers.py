"""Destinations of the records of `Monitor`: files, which can be continued and read, TensorBoard and functions."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradcentral.diagnostics.record import NET, Reading, Record, rounded
from gradcentral.extras import optional
from gradcentral.json_lines import append, drop_partial_line, read_complete, read_lines
from gradcentral.tables import csv_text

__all__ = ["RecordFile", "TensorBoard", "read_records", "writers_for"]

_KIND = "record of Monitor"
_READINGS = [field.name for field in fields(Reading)]
_COLUMNS = ["step", "placement", "skipped", "parameter", *_READINGS]
_HEADER = csv_text([_COLUMNS])
_START = '{"step": 0, "placement": 0, "skipped": '


def writers_for(to: Any) -> list[Callable[[Record], object]]:
    """Return the writers for the argument ``to`` of `Monitor`, whose documentation also lists the errors."""
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [writer for item in to for writer in writers_for(item)]
    if isinstance(to, (str, os.PathLike)):
        path = Path(to)
        if path.suffix and not path.is_dir():
            return [RecordFile(path)]
        return [TensorBoard(optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(path)), owned=True)]
    if hasattr(to, "add_scalar"):
        return [TensorBoard(to)]
    if callable(to):
        return [to]
    raise TypeError(
        "to must be a path (.jsonl, .csv, or a folder for TensorBoard), a SummaryWriter, a function of a record, or "
        f"a list of these, not {type(to).__name__}"
    )


@dataclass(frozen=True)
class TensorBoard:
    """Writer of scalars: ``gc/share`` of the whole net and ``gc_share/features.0.weight`` of a parameter.

    A writer that the monitor created is owned: it is flushed after each record and closed with the monitor.
    """

    writer: Any
    owned: bool = False

    def __call__(self, record: Record) -> None:
        scalars = {f"gc/{name}": value for name, value in vars(record.net).items()}
        for parameter, reading in record.layers.items():
            scalars |= {f"gc_{name}/{parameter}": value for name, value in vars(reading).items()}
        for tag, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(tag, value, record.step)
        if self.owned:
            self.writer.flush()


class RecordFile:
    """A file to which records are appended: one line of JSON per record, or one row of CSV per parameter.

    An existing file is continued, after removing a partial last line of a killed run; its last record is ``last``. A
    file with other contents is refused and not changed.
    """

    def __init__(self, path: Path) -> None:
        _check_suffix(path)
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, "")  # a path that is not writable fails here, not at the first record
        self.last = next(reversed(read_records(path)), None)
        drop_partial_line(path)
        if path.suffix == ".csv" and not path.stat().st_size:
            append(path, _HEADER)

    def __call__(self, record: Record) -> None:
        append(self.path, _csv_lines(record) if self.path.suffix == ".csv" else record.to_line() + "\n")


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a file that `Monitor` wrote, oldest record first.

    If the run was resumed from a checkpoint older than its last record, the records of the resumed run replace those
    after the checkpoint. A partial last line of a killed run is ignored.

    Raises:
        ValueError: the suffix is neither .jsonl nor .csv, or a line is not a record; the message gives its number.

    Examples:
        >>> import tempfile, pathlib
        >>> from gradcentral.diagnostics.record import Reading
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
        >>> RecordFile(path)(Record(0, None, False, Reading(share=0.5), {}))
        >>> read_records(path)[0].net.share
        0.5
    """
    path = Path(path)
    _check_suffix(path)
    kept: list[Record] = []
    try:
        _check_start(path)
        records = _read_csv(path) if path.suffix == ".csv" else read_lines(path, Record.from_line, _KIND)
    except ValueError as error:
        raise ValueError(f"{error}; give another path") from error
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(
            f"to: {path}: a file of records must end in .jsonl or .csv, not {path.suffix!r}; a folder for TensorBoard "
            "must have no suffix"
        )


def _check_start(path: Path) -> None:
    """Refuse a file whose only, partial line is not the start of a record, since opening it would empty it."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    expected, start = _HEADER, text
    if path.suffix == ".jsonl":  # compared without the values of step and placement
        expected, start = _START, re.sub(r'(?<=: )("[^"]*"?|\w+)', "0", text, count=2)[: len(_START)]
    if "\n" not in text and not expected.startswith(start):
        raise ValueError(f"{path}, line 1: not a {_KIND} (nor the start of one)")


def _csv_lines(record: Record) -> str:
    """Format a record as one row per parameter, followed by one for the whole net."""
    header = record.step, record.placement, record.skipped
    readings = {**record.layers, NET: record.net}
    return csv_text([*header, name, *rounded(vars(one).items()).values()] for name, one in readings.items())


def _read_csv(path: Path) -> list[Record]:
    reader = csv.reader(io.StringIO(read_complete(path), newline=""))
    if next(reader, _COLUMNS) != _COLUMNS:
        raise ValueError(f"{path}, line 1: not a {_KIND} (the columns differ)")
    records: list[Record] = []
    layers: dict[str, Reading] = {}
    last_step = None
    try:
        for step, placement, skipped, name, *cells in filter(None, reader):
            if step != last_step:
                layers = {}  # the run was killed before it wrote the row of the whole net
            numbers = [float(cell) if cell else None for cell in cells]
            layers[name], last_step = Reading(**dict(zip(_READINGS, numbers, strict=True))), step
            if name == NET:
                records.append(Record(int(step), placement or None, skipped == "True", layers.pop(NET), layers))
                last_step = None
    except ValueError as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a {_KIND} ({error})") from error
    return records
