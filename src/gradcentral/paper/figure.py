"""A figure with its data, written as PNG, SVG and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradcentral.plotting import LIGHT, Theme, to_png, to_svg

__all__ = ["Figure", "write_csv"]


class Figure(NamedTuple):
    """A figure with its data.

    Attributes:
        title: one line.
        draw: makes the matplotlib figure in the colors of a theme.
        header, rows: the plotted numbers as a table.
    """

    title: str
    draw: Callable[[Theme], Any]
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def write(self, folder: Path, name: str) -> None:
        """Write ``name.png``, ``name.svg`` and ``name.csv`` into a folder."""
        figure = self.draw(LIGHT)
        (folder / f"{name}.png").write_bytes(to_png(figure, self.title))
        (folder / f"{name}.svg").write_bytes(to_svg(figure))
        write_csv(folder / f"{name}.csv", self.header, self.rows)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table; None becomes an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
