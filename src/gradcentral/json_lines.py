"""Files with one record per line, appended to by one process and readable after it was killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["append", "drop_partial_line", "finish_last_line", "read_complete", "read_lines"]

T = TypeVar("T")

# What parsing a line may raise; deeply nested JSON raises a RecursionError.
_INVALID = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def append(path: Path, text: str, *, sync: bool = False) -> None:
    """Append complete lines to a file, which is created if it does not exist.

    The file is opened for each call, so that a killed process loses at most the lines it was writing. With ``sync``,
    they are on disk when the call returns, so that they also survive a power failure.
    """
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_complete(path: Path) -> str:
    """Return the complete lines of a file, without the partial last line that a killed writer may leave."""
    lines, newline, _ = path.read_bytes().rpartition(b"\n")
    return (lines + newline).decode("utf-8", errors="replace")


def read_lines(path: Path, parse: Callable[[str], T], kind: str) -> list[T]:
    """Parse each complete line of a file; an error gives the line number and ``kind``, the expected content."""
    parsed = []
    for number, line in enumerate(read_complete(path).split("\n")[:-1], start=1):
        try:
            parsed.append(parse(line))
        except _INVALID as error:
            raise ValueError(f"{path}, line {number}: not a {kind} ({error})") from error
    return parsed


def drop_partial_line(path: Path) -> None:
    """Truncate a file after its last newline, so that the next append starts a line."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def finish_last_line(path: Path, parse: Callable[[str], T], start: str) -> T | None:
    """Return the parsed last line if it lacks only its newline, which is added; otherwise drop the partial line.

    Raises:
        ValueError: the partial line does not start like a line of ours, so somebody else may have written it.
    """
    last = path.read_bytes().rpartition(b"\n")[2]
    try:
        parsed = parse(last.decode("utf-8"))
    except _INVALID:
        if last[: len(start)] != start.encode()[: len(last)]:
            raise ValueError(f"{path}, last line: not the start of a line that gradcentral writes") from None
        drop_partial_line(path)
        return None
    append(path, "\n", sync=True)
    return parsed
