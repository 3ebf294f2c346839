"""Tables as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["csv_text"]


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    r"""Format rows as CSV; None and NaN become empty cells.

    Examples:
        >>> csv_text([("name", "share"), ("weight", 0.5), ("bias", None)])
        'name,share\nweight,0.5\nbias,\n'
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row)
    return file.getvalue()
