"""The result of `probe`: a table, a CSV, a plot, and a finding for the model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.diagnostics.layer_report import NO_EFFECT, NO_GRADIENT, LayerReport
from gradcentral.diagnostics.probe_plot import plot_shares
from gradcentral.layout.table import aligned, compact_names
from gradcentral.plotting import LIGHT, Theme
from gradcentral.tables import csv_text

__all__ = ["ProbeReport"]

_MEANS = ("norm", "centered_norm", "largest", "centered_largest")


@dataclass(frozen=True)
class ProbeReport:
    """The result of `probe`; ``print`` it for a table.

    Attributes:
        layers: one `LayerReport` per parameter of the model, centered or skipped.
        whole: one `Effect` per batch, on the gradients of all parameters taken as one vector.
        losses: one per batch.
    """

    layers: tuple[LayerReport, ...]
    whole: tuple[Effect, ...]
    losses: tuple[float, ...]

    @property
    def share(self) -> float:
        """Fraction of the whole gradient's energy that centering removes, mean over the batches."""
        return math.fsum(effect.share for effect in self.whole) / len(self.whole)

    @property
    def centered(self) -> tuple[LayerReport, ...]:
        """The layers that GC centers."""
        return tuple(layer for layer in self.layers if layer.vectors is not None)

    @property
    def finding(self) -> str:
        """What centering does to the model, in words."""
        if not self.centered:
            return "GC centers nothing in this model: every parameter is skipped."
        if math.isnan(self.share):
            return "The effect of GC is unknown: gradients contain NaN or Inf."
        kinds = Counter(layer.kind for layer in self.centered)
        text = f"GC removes {self.share:.1%} of the whole gradient's energy. Its effect on the centered parameters: "
        text += ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()) + "."
        if kinds.keys() <= {NO_EFFECT, NO_GRADIENT}:
            return (
                f'{text} Placement "gradient" would change almost nothing in this model; "update" still keeps weight '
                "decay and adaptive step sizes from changing the means of the weights."
            )
        if any(layer.has_constant_input for layer in self.centered):
            text += " Where a layer's input is nearly constant, centering the input may help more than GC."
        return f"{text} This shows where GC acts, not whether it helps; to find out, run gradcentral compare."

    def __str__(self) -> str:
        """Format the centered parameters as a table, then the skipped ones by reason, then the finding."""
        header = ("parameter", "share", "‖g‖", "‖Φ(g)‖", "max |g|", "max |Φ(g)|", "cos", "input mean", "finding")
        rows = [
            (
                layer.name,
                "–" if math.isnan(layer.share) else f"{layer.share:.1%} ± {layer.spread:.1%}",
                *(_formatted(layer.mean(name)) for name in _MEANS),
                _formatted(layer.cosine, ".3f"),
                _formatted(layer.input.mean if layer.input else math.nan),
                layer.finding,
            )
            for layer in self.centered
        ]
        parts = [aligned([header, *rows])] if rows else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.vectors is None:
                reasons.setdefault(layer.reason, []).append(layer.name)
        if reasons:
            lines = [f"  {reason}: {', '.join(compact_names(names))}" for reason, names in reasons.items()]
            parts.append("\n".join(["Skipped:", *lines]))
        return "\n\n".join([*parts, self.finding])

    __repr__ = __str__

    def to_csv(self) -> str:
        """Format the report as CSV: one line per parameter, with means over the batches."""
        numbers = (*_MEANS, "cosine")
        header = ("parameter", "kind", "share", "share_spread", *numbers, "input_mean", "input_offset", "finding")
        rows = [
            (
                *(layer.name, layer.kind, layer.share, layer.spread),
                *map(layer.mean, numbers),
                *(layer.input or (None, None)),
                layer.finding,
            )
            for layer in self.layers
        ]
        return csv_text([header, *rows])

    def plot(self, theme: Theme = LIGHT) -> Any:
        """Draw the share of each centered parameter.

        Returns:
            A ``matplotlib.figure.Figure``: show it in a notebook, or ``figure.savefig("probe.png")``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plot_shares(self.centered, self.share, theme)


def _formatted(value: float, spec: str = ".3g") -> str:
    return "–" if math.isnan(value) else f"{value:{spec}}"
