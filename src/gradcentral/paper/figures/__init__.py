"""The figures: each ``…_figure`` measures what it shows in the runs of a `Study` and returns a `Figure`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gradcentral.plotting import LIGHT, new_figure, style, to_png, to_svg

__all__ = ["Figure", "drawing", "put_legend", "write_csv"]


class Figure(NamedTuple):
    """A matplotlib figure with its title, and the plotted numbers as a table."""

    title: str
    image: Any
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def write(self, folder: Path, name: str) -> None:
        """Write ``name.png``, ``name.svg`` and ``name.csv`` into a folder."""
        (folder / f"{name}.png").write_bytes(to_png(self.image, self.title))
        (folder / f"{name}.svg").write_bytes(to_svg(self.image))
        write_csv(folder / f"{name}.csv", self.header, self.rows)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table; None becomes an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


@contextmanager
def drawing(height: float) -> Iterator[Any]:
    """A new figure of the width of a page, to be drawn in the block."""
    with style(LIGHT):
        yield new_figure(9.8, height)


def put_legend(figure: Any, axis: Any) -> None:
    """Put the legend of an axis next to the figure's title."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(handles), frameon=False)
