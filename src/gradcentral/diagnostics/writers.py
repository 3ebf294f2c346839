"""Where `Monitor` sends its records: files, TensorBoard and functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from gradcentral.diagnostics.record import Record
from gradcentral.diagnostics.record_file import RecordFile
from gradcentral.extras import optional

__all__ = ["TensorBoard", "Writer", "writers_for"]

Writer: TypeAlias = Callable[[Record], object]


def writers_for(to: Any) -> list[Writer]:
    """Return the writers that the argument ``to`` of `Monitor` describes.

    Raises:
        TypeError: it is of a type that records cannot be written to.
        ValueError: the suffix of a file is neither .jsonl nor .csv, or the file contains something other than records.
        MissingExtraError: it is a folder, and TensorBoard is not installed.
    """
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


class TensorBoard:
    """Writes scalars to a ``SummaryWriter``, or to any object with ``add_scalar(tag, value, step)``.

    Tags are ``gc/share`` for the whole net and ``gc_share/features.0.weight`` for a parameter.

    Args:
        writer: receives the scalars.
        owned: whether to flush it after each record and to close it.
    """

    def __init__(self, writer: Any, *, owned: bool = False) -> None:
        self._writer = writer
        self._owned = owned

    def __call__(self, record: Record) -> None:
        """Write the measurements that are not None."""
        for name, value in record.net.items():
            self._writer.add_scalar(f"gc/{name}", value, record.step)
        for parameter, reading in record.layers.items():
            for name, value in reading.items():
                self._writer.add_scalar(f"gc_{name}/{parameter}", value, record.step)
        if self._owned:
            self._writer.flush()

    def close(self) -> None:
        """Close the writer if it is owned."""
        if self._owned:
            self._writer.close()
