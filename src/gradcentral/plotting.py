"""The style of all figures, in light and dark colors, and saving them as PNG and SVG."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gradcentral.extras import optional

__all__ = ["DARK", "LIGHT", "STYLES", "Theme", "new_figure", "recolor", "style", "to_png", "to_svg"]


@dataclass(frozen=True)
class Theme:
    """Colors of a figure. The colors of the arms are from Okabe and Ito's palette for color-blind readers."""

    background: str
    text: str
    faint: str
    arms: dict[str, str]


_ARMS = ("none", "gradient", "regularized", "update")
_ON_LIGHT, _ON_DARK = ("#6b7280", "#0072b2", "#009e73", "#d55e00"), ("#a3abb8", "#56b4e9", "#4cc9a2", "#ef8a3c")
LIGHT = Theme("#ffffff", "#1f2328", "#d8dce1", dict(zip(_ARMS, _ON_LIGHT, strict=True)))
DARK = Theme("#14171c", "#e4e7eb", "#3a404a", dict(zip(_ARMS, _ON_DARK, strict=True)))

STYLES = {"none": "--", "gradient": "-", "regularized": ":", "update": "-."}
"""Line style of each arm, so that gray prints stay readable."""


def style(theme: Theme) -> AbstractContextManager[None]:
    """Apply the style to every figure drawn in a ``with`` block."""
    settings: dict[str, object] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.background),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme.faint),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
        **dict.fromkeys(("ytick.major.size", "ytick.minor.size"), 0),
    }
    settings |= {"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "xtick.major.size": 3}
    settings |= {"font.size": 10, "axes.titlesize": 11, "font.family": ["DejaVu Sans"]}
    context: AbstractContextManager[None] = optional("matplotlib").rc_context(settings)
    return context


def new_figure(width: float, height: float) -> Any:
    """Create a figure of this size in inches, without pyplot, which would open windows and keep global state."""
    return optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Any, title: str) -> bytes:
    """Render a figure at 200 dpi, with a title."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _save(figure, format="png", dpi=200)


def to_svg(figure: Any) -> bytes:
    """Render a figure as SVG, without a date, so that equal figures give equal files."""
    return _save(figure, format="svg", metadata={"Date": None})


def recolor(svg: bytes, theme: Theme, other: Theme) -> bytes:
    """Convert the output of `to_svg` from one theme to another, which is much faster than drawing again."""
    colors = [(getattr(theme, name), getattr(other, name)) for name in ("background", "text", "faint")]
    colors += [(color, other.arms[arm]) for arm, color in theme.arms.items()]
    # In one pass: a color of one theme may have another role in the other theme.
    table = {old.encode(): new.encode() for old, new in colors}
    return re.sub(b"|".join(table), lambda found: table[found.group()], svg)


def _save(figure: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    with optional("matplotlib").rc_context({"svg.hashsalt": "gradcentral"}):  # otherwise SVG identifiers are random
        figure.savefig(file, facecolor=figure.get_facecolor(), **options)
    return file.getvalue()
