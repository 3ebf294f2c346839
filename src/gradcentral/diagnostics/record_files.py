"""Files of the records of `Monitor`: one line of JSON per record, or one row of CSV per parameter."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from dataclasses import fields
from pathlib import Path

from gradcentral.diagnostics.claims import Claim
from gradcentral.diagnostics.record import NET, Reading, Record, rounded
from gradcentral.json_lines import append, drop_partial_line, read_complete, read_lines
from gradcentral.tables import csv_text

__all__ = ["RecordFile", "read_records"]

_KIND = "record of Monitor"
_READINGS = [field.name for field in fields(Reading)]
_COLUMNS = ["step", "name", "placement", "skipped", "parameter", *_READINGS]
_HEADER = csv_text([_COLUMNS])
_START = '{"step": 0, "placement": 0, "skipped": '


class RecordFile:
    """A file to which the monitor ``name`` appends its records, and which no other process may write meanwhile.

    An existing file is continued, after removing a partial last line of a killed run. A file with other contents is
    refused and not changed. A record that cannot be written, such as on a full disk, raises an exception; its partial
    line is removed before the next record.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        _check_suffix(path)
        self._path, self._name = path, name
        self._claim: Claim | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, "")  # a path that is not writable fails here, not at the first step
        read_records(path)

    def start(self) -> Record | None:
        """Claim the file for this process, and return the last record of this monitor in it, if there is one."""
        if self._claim is None:
            self._path.touch()
            self._claim = Claim(self._path, self._name, self._path)
            self._process = os.getpid()
        own = [record for record in read_records(self._path) if record.name == self._name]
        drop_partial_line(self._path)
        return own[-1] if own else None

    def __call__(self, record: Record) -> None:
        """Append a record."""
        if self._claim is None:
            self.start()
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked from the one that trained; create the Monitor in this one")
        started = self._path.exists() and self._path.stat().st_size > 0
        if started and not _ends_with_newline(self._path):  # a write has failed
            drop_partial_line(self._path)
        if self._path.suffix == ".csv":
            append(self._path, ("" if started else _HEADER) + _csv_lines(record))
        else:
            append(self._path, record.to_line() + "\n")

    def close(self) -> None:
        """Let others write the file."""
        if self._claim is not None:
            self._claim.release()
        self._claim = None


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a file that `Monitor` wrote, oldest record first.

    Records of several monitors are told apart by ``record.name``. If the run was resumed from a checkpoint older than
    its last record, the records of the resumed run replace those after the checkpoint. A partial last line of a killed
    run is ignored.

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
    try:
        _check_start(path)
        records = _read_csv(path) if path.suffix == ".csv" else read_lines(path, Record.from_line, _KIND)
    except ValueError as error:
        raise ValueError(f"{error}; give another path") from error
    kept: dict[str | None, list[int]] = {}  # positions by monitor
    for position, record in enumerate(records):
        own = kept.setdefault(record.name, [])
        while own and records[own[-1]].step >= record.step:
            own.pop()
        own.append(position)
    return [records[position] for position in sorted(itertools.chain(*kept.values()))]


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


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _csv_lines(record: Record) -> str:
    """Format a record as one row per parameter, followed by one for the whole net."""
    header = record.step, record.name, record.placement, record.skipped
    readings = {**record.layers, NET: record.net}
    return csv_text([*header, name, *rounded(vars(one).items()).values()] for name, one in readings.items())


def _read_csv(path: Path) -> list[Record]:
    reader = csv.reader(io.StringIO(read_complete(path), newline=""))
    if next(reader, _COLUMNS) != _COLUMNS:
        raise ValueError(f"{path}, line 1: not a {_KIND} (the columns differ)")
    records: list[Record] = []
    layers: dict[str, Reading] = {}
    last = None
    try:
        for step, name, placement, skipped, parameter, *cells in filter(None, reader):
            if (step, name) != last:
                layers = {}  # the run was killed before it wrote the row of the whole net
            numbers = [float(cell) if cell else None for cell in cells]
            layers[parameter], last = Reading(**dict(zip(_READINGS, numbers, strict=True))), (step, name)
            if parameter == NET:
                header = int(step), placement or None, skipped == "True"
                records.append(Record(*header, layers.pop(NET), layers, name or None))
                last = None
    except ValueError as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a {_KIND} ({error})") from error
    return records
