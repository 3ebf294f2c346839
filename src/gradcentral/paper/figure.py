"""A figure with the data behind it, written as PNG, SVG and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcentral.plotting import LIGHT, Theme, to_png, to_svg

__all__ = ["Figure", "write_csv"]


@dataclass(frozen=True)
class Figure:
    """A figure with the data behind it.

    Attributes:
        title: what it shows, in one line.
        draw: makes the matplotlib figure in a theme's colors.
        header, rows: the numbers it shows, as a table.
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
    """Write a table; a number that does not exist is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
