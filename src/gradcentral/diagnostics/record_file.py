"""Files of records in JSON lines or CSV: writing, continuing and reading them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path

from gradcentral.diagnostics.record import CSV_COLUMNS, NET, Record
from gradcentral.json_lines import append, drop_partial_line, read_complete, read_lines
from gradcentral.tables import csv_text

__all__ = ["RecordFile", "read_records"]

_KIND = "record of Monitor"
_HEADER = csv_text([CSV_COLUMNS])
_START = '{"step": 0, "placement": '


class RecordFile:
    """A file to which records are appended: one line of JSON per record, or one row of CSV per parameter.

    An existing file is continued, after a partial last line of a killed run has been removed. A file with other
    contents is refused and not changed.

    Attributes:
        path: path of the file.
        last: last record in the file when it was opened, or None.

    Raises:
        ValueError: the suffix is neither .jsonl nor .csv, or the file contains something other than records.
    """

    def __init__(self, path: Path) -> None:
        _check_suffix(path)
        self.path = path
        self._is_csv = path.suffix == ".csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, "")  # a path that is not writable fails here, not at the first record
        records = read_records(path)
        self.last = records[-1] if records else None
        drop_partial_line(path)
        if self._is_csv and not path.stat().st_size:
            append(path, _HEADER)

    def __call__(self, record: Record) -> None:
        """Append a record."""
        append(self.path, csv_text(record.to_rows()) if self._is_csv else record.to_line() + "\n")


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
    """Refuse a file without a complete line that is not the start of a record, since opening it would empty it."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    if "\n" in text:
        return
    if not (_HEADER.startswith(text) if path.suffix == ".csv" else _is_start_of_record(text)):
        raise ValueError(f"{path}, line 1: not a {_KIND} (nor the start of one)")


def _is_start_of_record(text: str) -> bool:
    try:
        Record.from_line(text)
    except json.JSONDecodeError:
        return _START.startswith(re.sub(r"\d+", "0", text, count=1)[: len(_START)])
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return True


def _read_csv(path: Path) -> list[Record]:
    reader = csv.DictReader(io.StringIO(read_complete(path), newline=""))
    if tuple(reader.fieldnames or CSV_COLUMNS) != CSV_COLUMNS:
        raise ValueError(f"{path}, line 1: not a {_KIND} (the columns differ)")
    records: list[Record] = []
    rows: list[dict[str, str]] = []
    for row in reader:
        if rows and rows[-1]["step"] != row["step"]:
            rows = []  # the run was killed before it wrote the row of the whole net
        rows.append(row)
        if row["parameter"] == NET:
            try:
                records.append(Record.from_rows(rows))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: not a {_KIND} ({error})") from error
            rows = []
    return records
