"""Where `Monitor` writes its records: files, TensorBoard, functions; and reading files back."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from gradcentral.diagnostics.record import COLUMNS, NET, Record
from gradcentral.extras import optional

__all__ = ["RecordFile", "Sink", "TensorBoard", "read_records", "sinks"]

Sink: TypeAlias = Callable[[Record], object]

_HEADER = ",".join(COLUMNS) + "\n"
_LINE = '{"step": 0, "placement": '
"""How a record begins in JSON, whatever its step."""


def sinks(to: Any) -> list[Sink]:
    """The sinks that ``to`` of `Monitor` stands for.

    Raises:
        TypeError: it is nothing that can be written to.
        ValueError: a file is neither .jsonl nor .csv, or holds something else than records.
        MissingExtraError: a folder is given, and TensorBoard is not installed.
    """
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [sink for item in to for sink in sinks(item)]
    if isinstance(to, (str, os.PathLike)):
        return [_to_path(Path(to))]
    if hasattr(to, "add_scalar"):
        return [TensorBoard(to)]
    if callable(to):
        return [to]
    raise TypeError(
        "to must be a path (.jsonl, .csv, or a folder for TensorBoard), a SummaryWriter, a function of a record, or "
        f"a list of these, not {type(to).__name__}"
    )


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records in a file that `Monitor` wrote, oldest first; numbers have six digits.

    Where a run was resumed from a checkpoint older than the last record, the later records stand. What a killed run
    left half written at the end is passed over.

    Raises:
        ValueError: the file is neither .jsonl nor .csv, or a line of it is no record (naming it), nor the beginning
            of one.

    Examples:
        >>> import tempfile, pathlib
        >>> from gradcentral.diagnostics.record import Reading
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
        >>> RecordFile(path)(Record(0, None, False, Reading(share=0.5), {}))
        >>> read_records(path)[0].net.share
        0.5
    """
    path = Path(path)
    read = _format(path)
    kept: list[Record] = []
    for record in read(path, _whole_lines(path)):
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


class RecordFile:
    """A file of records: one line of JSON each, or one row of CSV a parameter.

    A file that is there is gone on with, after what a killed run left half written at its end has been cut off: after
    records, or where it begins as a record does. It is opened for each record, so that nothing is lost whatever ends
    the run.

    Attributes:
        path: where it is.
        last: the last record in the file when it was opened, or None.

    Raises:
        ValueError: the file is neither .jsonl nor .csv, or holds something else than records.
    """

    def __init__(self, path: Path) -> None:
        read = _format(path)
        self.path = path
        self._is_csv = read is _read_csv
        self.last: Record | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # fails now where it would fail at the first record
            pass
        whole = _whole_lines(path)
        for self.last in read(path, whole):
            pass
        with path.open("r+b") as file:
            file.truncate(len(whole))
        if self._is_csv and not whole:
            path.write_text(_HEADER, encoding="utf-8", newline="")

    def __call__(self, record: Record) -> None:
        """Append a record."""
        text = _csv_lines(record.to_rows()) if self._is_csv else record.to_line() + "\n"
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)


class TensorBoard:
    """Scalars of a ``SummaryWriter``, or of anything with its ``add_scalar(tag, value, step)``.

    ``gc/share`` is the whole net's, ``gc_share/features.0.weight`` a parameter's, and so for every number.
    """

    def __init__(self, writer: Any, *, owned: bool = False) -> None:
        self._writer = writer
        self._owned = owned

    def __call__(self, record: Record) -> None:
        """Write the numbers that there are."""
        for name, value in record.net.items():
            self._writer.add_scalar(f"gc/{name}", value, record.step)
        for parameter, reading in record.layers.items():
            for name, value in reading.items():
                self._writer.add_scalar(f"gc_{name}/{parameter}", value, record.step)
        if self._owned:
            self._writer.flush()

    def close(self) -> None:
        """Close the writer if it was made here; the user's own stays open."""
        if self._owned:
            self._writer.close()


def _to_path(path: Path) -> Sink:
    if path.is_dir() or not path.suffix:
        return TensorBoard(optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(path)), owned=True)
    return RecordFile(path)


def _format(path: Path) -> Callable[[Path, bytes], Iterator[Record]]:
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix)
    if reader is None:
        raise ValueError(
            f"to: {path}: a file of records ends in .jsonl or .csv, not {path.suffix!r}; a new folder for TensorBoard "
            "has no suffix"
        )
    return reader


def _whole_lines(path: Path) -> bytes:
    """The file without what was left half written at its end; where it is nothing of ours, there is none to leave."""
    content = path.read_bytes()
    whole, torn = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    begins = _begins_header if path.suffix == ".csv" else _begins_record
    if not whole and not begins(_text(torn)):
        raise _no_record(path, 1, ValueError("nor the beginning of one"))
    return whole


def _begins_header(torn: str) -> bool:
    return _HEADER.startswith(torn)


def _begins_record(torn: str) -> bool:
    try:
        Record.from_line(torn)
    except json.JSONDecodeError:
        return _LINE.startswith(re.sub(r"\d+", "0", torn, count=1)[: len(_LINE)])
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return True


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")


def _read_jsonl(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(_text(content).splitlines(), start=1):
        try:
            yield Record.from_line(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _no_record(path, number, error) from error


def _read_csv(path: Path, content: bytes) -> Iterator[Record]:
    if not content:
        return
    reader = csv.DictReader(io.StringIO(_text(content), newline=""))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise _no_record(path, 1, ValueError("the columns are others"))
    rows: list[dict[str, str]] = []
    for row in reader:
        if rows and rows[-1]["step"] != row["step"]:
            rows = []  # torn: the run was killed before it wrote the whole net's row
        rows.append(row)
        if row["parameter"] == NET:
            try:
                yield Record.from_rows(rows)
            except (ValueError, TypeError, KeyError) as error:
                raise _no_record(path, reader.line_num, error) from error
            rows = []


def _no_record(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}, line {line}: is no record of Monitor ({error}): give another path")


def _csv_lines(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
