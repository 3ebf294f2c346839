"""The plot of `probe`: one bar per centered parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradcentral.diagnostics.layer_report import NEAR_TOTAL, NO_EFFECT, LayerReport
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["plot_shares"]

_MAX_BARS = 40
_MAX_NAME = 34


def plot_shares(layers: Sequence[LayerReport], whole: float, theme: Theme) -> Any:
    """Draw the fraction of each gradient's energy that GC removes, with its spread over the batches.

    Args:
        layers: the centered parameters; of more than 40, those with the largest shares are drawn.
        whole: share of the whole model, drawn as a dotted line.
        theme: colors.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    shown = layers
    if len(layers) > _MAX_BARS:
        # NaN compares false with everything and would leave the order undefined.
        shown = sorted(layers, key=lambda layer: -math.inf if math.isnan(layer.share) else -layer.share)[:_MAX_BARS]
    with style(theme):
        figure = new_figure(9.8, 1.4 + 0.34 * max(len(shown), 1))
        axis = figure.subplots()
        for position, layer in enumerate(shown):
            _bar(axis, position, layer, theme)
        axis.axvline(whole, color=theme.text, lw=1, ls=":", zorder=1)
        axis.set_yticks(range(len(shown)), [_shortened(layer.name) for layer in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(0, 1.16)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axis.grid(visible=False, axis="y")
        label = "share: fraction of the gradient's energy that GC removes\n"
        label += f"line: ± standard deviation over the batches; dotted: the whole model, {whole:.0%}"
        if len(shown) < len(layers):
            label += f"; the {len(shown)} largest of {len(layers)} parameters"
        axis.set_xlabel(label)
        return figure


def _bar(axis: Any, position: int, layer: LayerReport, theme: Theme) -> None:
    color = {NO_EFFECT: theme.arms["none"], NEAR_TOTAL: theme.arms["update"]}.get(layer.kind, theme.arms["gradient"])
    axis.barh(position, layer.share, height=0.62, color=color, zorder=2)
    low, high, text = 0.0, 0.0, layer.kind
    if math.isfinite(layer.share):
        low, high = max(0.0, layer.share - layer.spread), min(1.0, layer.share + layer.spread)
        percent = f"{layer.share:.0%}" if layer.share >= 0.01 or layer.share == 0 else f"{layer.share:.1%}"
        text = f"{percent}  {text}"
    if high > low:
        axis.plot([low, high], [position, position], color=theme.text, lw=1.4, zorder=3)
    background = {"facecolor": theme.background, "edgecolor": "none", "pad": 1}
    axis.text(high + 0.01, position, text, va="center", color=theme.text, fontsize=9, bbox=background)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"
