"""How every figure looks, in light and in dark, and how it is written to a file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gradcentral.extras import optional

__all__ = ["DARK", "LIGHT", "STYLES", "Theme", "new_figure", "recolored", "style", "to_png", "to_svg"]


@dataclass(frozen=True)
class Theme:
    """Colors of a figure. Those of the arms are Okabe and Ito's, which color-blind people can tell apart."""

    background: str
    text: str
    faint: str
    arms: dict[str, str]


LIGHT = Theme("#ffffff", "#1f2328", "#d8dce1", {"none": "#6b7280", "gradient": "#0072b2", "update": "#d55e00"})
DARK = Theme("#14171c", "#e4e7eb", "#3a404a", {"none": "#a3abb8", "gradient": "#56b4e9", "update": "#ef8a3c"})

# Line styles too, for print in gray.
STYLES = {"none": "--", "gradient": "-", "update": "-."}


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    with optional("matplotlib").rc_context(
        {
            "figure.facecolor": theme.background,
            "axes.facecolor": theme.background,
            "text.color": theme.text,
            "axes.labelcolor": theme.text,
            "axes.edgecolor": theme.faint,
            "xtick.color": theme.text,
            "ytick.color": theme.text,
            "axes.grid": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "xtick.major.size": 3,
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
            "font.size": 10,
            "axes.titlesize": 11,
            "font.family": ["DejaVu Sans"],
            "svg.hashsalt": "gradcentral",
        }
    ):
        yield


def new_figure(width: float, height: float) -> Any:
    """Without pyplot, whose windows and global state are the caller's."""
    return optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Any, title: str) -> bytes:
    """The figure at 200 dots an inch, with a title, as it may be shown on its own."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _save(figure, format="png", dpi=200)


def to_svg(figure: Any) -> bytes:
    """The figure as vectors, letters included."""
    return _save(figure, format="svg", metadata={"Date": None})


def recolored(svg: bytes, theme: Theme, other: Theme) -> bytes:
    """A figure that `to_svg` wrote in one theme, in another: drawing it anew takes much longer."""
    colors = [(getattr(theme, name), getattr(other, name)) for name in ("background", "text", "faint")]
    colors += [(color, other.arms[arm]) for arm, color in theme.arms.items()]
    # All at once: one theme's color may be the other's for something else.
    table = {one.encode(): another.encode() for one, another in colors}
    return re.sub(b"|".join(table), lambda found: table[found.group()], svg)


def _save(figure: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, facecolor=figure.get_facecolor(), **options)
    return file.getvalue()
