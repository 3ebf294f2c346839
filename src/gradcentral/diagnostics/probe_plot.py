"""The charts of `probe`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from gradcentral.diagnostics.findings import ERASES, NO_OP
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["shares"]

# More bars than this can't be read; those that follow are summed up in words.
_MOST_BARS = 40


class Bar(Protocol):
    """What is shown of a parameter, such as a `LayerReport`."""

    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def spread(self) -> float: ...
    @property
    def kind(self) -> str: ...


def shares(layers: Sequence[Bar], whole: float, theme: Theme) -> Any:
    """A bar a centered parameter: the part of its gradient's energy that GC removes, with its spread over batches.

    Args:
        layers: the centered parameters.
        whole: the share of the whole model.
        theme: colors.
    """
    shown = layers
    if len(layers) > _MOST_BARS:
        shown = tuple(sorted(layers, key=lambda layer: -layer.share)[:_MOST_BARS])
    colors = {NO_OP: theme.arms["none"], ERASES: theme.arms["update"]}
    with style(theme):
        figure = new_figure(9.8, 1.25 + 0.34 * max(len(shown), 1))
        axis = figure.subplots()
        for at, layer in enumerate(shown):
            color = colors.get(layer.kind, theme.arms["gradient"])
            axis.barh(-at, layer.share, height=0.62, color=color, zorder=2)
            if layer.spread > 0:
                low, high = max(0.0, layer.share - layer.spread), min(1.0, layer.share + layer.spread)
                axis.plot([low, high], [-at, -at], color=theme.text, lw=1.4, zorder=3)
            text = f"{layer.share:.0%}" if layer.share >= 0.01 or layer.share == 0 else f"{layer.share:.1%}"
            known = math.isfinite(layer.share)
            axis.text(
                min(layer.share + layer.spread, 1.0) + 0.01 if known else 0.01,
                -at,
                f"{text}  {layer.kind}" if known else layer.kind,
                va="center",
                color=theme.text,
                fontsize=9,
                bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1},
            )
        axis.axvline(whole, color=theme.text, lw=1, ls=":", zorder=1)
        names = [layer.name for layer in shown]
        axis.set_yticks([-at for at in range(len(names))], [_short(name) for name in names])
        axis.set_ylim(-len(names) + 0.4, 0.6)
        axis.set_xlim(0, 1.16)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axis.grid(visible=False, axis="y")
        label = f"share: part of the gradient's energy that GC removes    (dotted: the whole model, {whole:.0%})"
        if len(shown) < len(layers):
            label = f"{label}\nthe {len(shown)} largest of {len(layers)} centered parameters"
        axis.set_xlabel(label)
        return figure


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
