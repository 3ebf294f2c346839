"""The result of `probe`: a finding for each parameter and for the model, as text, table, CSV and plot."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradcentral.diagnostics.advice import advice
from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.diagnostics.input_means import InputMean
from gradcentral.layout.table import compact_names
from gradcentral.plotting import LIGHT, Theme, new_figure, style
from gradcentral.tables import csv_text
from gradcentral.text_table import aligned
from gradcentral.weight_vectors import WeightVectors

__all__ = ["LayerReport", "ProbeReport"]

NO_EFFECT, PARTIAL, NEAR_TOTAL = "no effect", "partial", "near-total"
SKIPPED, NO_GRADIENT, NON_FINITE = "skipped", "no gradient", "non-finite"

# A share below 1 % rotates the gradient by less than 6 degrees; one above 90 % leaves less than a third of its norm.
_NO_EFFECT_BELOW, _NEAR_TOTAL_ABOVE = 0.01, 0.9
_CENTERED_BELOW, _CONSTANT_ABOVE = 0.02, 0.8
_MEANS = ("norm", "centered_norm", "largest", "centered_largest")
_MAX_BARS, _MAX_NAME = 40, 34
_LEGEND = (
    "share: fraction of the energy of the parameter's gradient g that GC removes (mean ± standard deviation over the "
    "batches); energy: fraction of the whole gradient's energy that is in g; input: fraction of the energy of the "
    "layer's inputs that is in their means."
)


@dataclass(frozen=True)
class LayerReport:
    """The effect of centering on one parameter, over several batches.

    Attributes:
        name: name of the parameter.
        vectors: its weight vectors; None if it is skipped.
        reason: why it is skipped; empty if it is centered.
        effects: one `Effect` per batch that gave it a gradient.
        input: mean of its layer's inputs, if they could be observed.
    """

    name: str
    vectors: WeightVectors | None
    reason: str
    effects: tuple[Effect, ...]
    input: InputMean | None

    @property
    def share(self) -> float:
        """Fraction of the gradient's energy that centering removes, mean over the batches; 0 if it is skipped."""
        return self.mean("share") if self.effects else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the share over the batches; 0 for one batch."""
        if math.isnan(self.share):
            return math.nan
        return statistics.stdev(effect.share for effect in self.effects) if len(self.effects) > 1 else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between g and Φ(g), mean over the batches; NaN without a gradient."""
        return self.mean("cosine")

    def mean(self, name: str) -> float:
        """Mean over the batches of an attribute of `Effect`, such as ``"norm"``; NaN without a gradient."""
        values = [float(getattr(effect, name)) for effect in self.effects]
        return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan

    @property
    def kind(self) -> str:
        """``"no effect"``, ``"partial"``, ``"near-total"``, ``"skipped"``, ``"no gradient"`` or ``"non-finite"``."""
        if self.vectors is None:
            return SKIPPED
        if not all(math.isfinite(effect.norm) for effect in self.effects):
            return NON_FINITE
        if not any(effect.norm > 0 for effect in self.effects):
            return NO_GRADIENT
        if self.share < _NO_EFFECT_BELOW:
            return NO_EFFECT
        return PARTIAL if self.share <= _NEAR_TOTAL_ABOVE else NEAR_TOTAL

    @property
    def finding(self) -> str:
        """The kind, followed by its cause if it is known."""
        return f"{self.kind}: {cause}" if (cause := self._cause()) else self.kind

    @property
    def has_constant_input(self) -> bool:
        """Whether centering removes nearly everything because the layer's input is nearly constant."""
        return self.kind == NEAR_TOTAL and self.input is not None and self.input.offset > _CONSTANT_ABOVE

    def _cause(self) -> str:
        if self.kind == NON_FINITE:
            return "its gradient contains NaN or Inf"
        if self.kind == NO_GRADIENT:
            return "the loss of these batches does not depend on it"
        if self.vectors is None:
            return self.reason
        if self.input is None or math.isnan(self.input.offset):
            return ""
        if self.kind == NO_EFFECT:
            centered = self.input.offset < _CENTERED_BELOW
            return "its input is already centered (as after LayerNorm)" if centered else "its input's mean cancels out"
        cause = f"{self.input.offset:.0%} of its input's energy is in the mean"
        if self.kind == PARTIAL:
            return cause
        return f"{cause}{', as after a sigmoid' if self.has_constant_input else '; the rest cancels over the batch'}"


@dataclass(frozen=True)
class ProbeReport:
    """The result of `gradcentral.probe`; ``print`` it for a table.

    Attributes:
        layers: one `LayerReport` per parameter of the model, centered or skipped.
        whole: one `Effect` per batch, on the gradients of all parameters taken as one vector.
        losses: one per batch.
        kinds: the kinds of model, among those with measurements, that the model belongs to.
    """

    layers: tuple[LayerReport, ...]
    whole: tuple[Effect, ...]
    losses: tuple[float, ...]
    kinds: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Fraction of the whole gradient's energy that centering removes, mean over the batches."""
        return math.fsum(effect.share for effect in self.whole) / len(self.whole)

    def energy(self, layer: LayerReport) -> float:
        """Return the fraction of the whole gradient's energy that is in the layer's gradient, over all batches."""
        whole = math.hypot(*(effect.norm for effect in self.whole))
        return (math.hypot(*(effect.norm for effect in layer.effects)) / whole) ** 2 if whole != 0 else 0.0

    @property
    def centered(self) -> tuple[LayerReport, ...]:
        """The layers that GC centers."""
        return tuple(layer for layer in self.layers if layer.vectors is not None)

    @property
    def finding(self) -> str:
        """The effect of centering on the model, in words."""
        if not self.centered:
            return "GC centers nothing in this model: every parameter is skipped."
        if math.isnan(self.share):
            return "The effect of GC is unknown: gradients contain NaN or Inf."
        kinds = Counter(layer.kind for layer in self.centered)
        skipped = math.fsum(self.energy(layer) for layer in self.layers if layer.vectors is None)
        text = (
            f"GC removes {self.share:.1%} of the whole gradient's energy. A layer's share counts in proportion to its "
            f"part of that energy, and {skipped:.0%} of it is in skipped parameters. "
        )
        found = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
        text += f"Effect on the centered parameters: {found}."
        if kinds.keys() <= {NO_EFFECT, NO_GRADIENT}:
            return (
                f'{text} Placement "gradient" would change almost nothing in this model; "update" still keeps weight '
                "decay and adaptive step sizes from changing the means of the weights."
            )
        if any(layer.has_constant_input for layer in self.centered):
            text += " Where a layer's input is nearly constant, centering the input may help more than GC."
        return f"{text} This shows where GC acts, not whether it helps; to find out, run gradcentral compare."

    @property
    def advice(self) -> str:
        """What was measured for models of this kind; empty if GC centers nothing in this one."""
        return advice(self.kinds) if self.centered else ""

    def __str__(self) -> str:
        """Format the centered parameters as a table, the causes, the skipped parameters, the finding and the advice."""
        header = ("parameter", "share", "energy", "‖g‖", "max |g|", "input", "finding")
        rows = [
            (
                layer.name,
                "–" if math.isnan(layer.share) else f"{layer.share:.1%} ± {layer.spread:.1%}",
                _formatted(self.energy(layer), ".1%"),
                _formatted(layer.mean("norm")),
                _formatted(layer.mean("largest")),
                _formatted(layer.input.offset if layer.input else math.nan, ".0%"),
                layer.kind,
            )
            for layer in self.centered
        ]
        table = f"{aligned([header, *rows])}\n\n{_wrapped(_LEGEND)}" if rows else ""
        # The cause of a partial effect is the column "input".
        causes = [(layer.finding, layer.name) for layer in self.centered if layer.kind not in (PARTIAL, layer.finding)]
        skipped = [(layer.reason, layer.name) for layer in self.layers if layer.vectors is None]
        lists = _grouped("Causes:", causes), _grouped("Skipped:", skipped)
        blocks = table, *lists, _wrapped(self.finding), _wrapped(self.advice)
        return "\n\n".join(filter(None, blocks))

    __repr__ = __str__

    def to_csv(self) -> str:
        """Format the report as CSV: one line per parameter, with means over the batches."""
        numbers = (*_MEANS, "cosine")
        header = (
            *("parameter", "kind", "share", "share_spread", "energy"),
            *(*numbers, "input_mean", "input_offset", "finding"),
        )
        rows: list[tuple[object, ...]] = [header]
        for layer in self.layers:
            first = layer.name, layer.kind, layer.share, layer.spread, self.energy(layer)
            rows.append((*first, *map(layer.mean, numbers), *(layer.input or (None, None)), layer.finding))
        return csv_text(rows)

    def plot(self, theme: Theme = LIGHT) -> Any:
        """Draw the share of each centered parameter, with its spread; only the 40 largest if there are more.

        Returns:
            A ``matplotlib.figure.Figure``. Show it in a notebook, or ``figure.savefig("probe.png")``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        layers = shown = list(self.centered)
        if len(layers) > _MAX_BARS:
            # Comparisons with NaN are false, which would leave the order undefined.
            shown = sorted(layers, key=lambda layer: -math.inf if math.isnan(layer.share) else -layer.share)[:_MAX_BARS]
        with style(theme):
            figure = new_figure(9.8, 1.4 + 0.34 * max(len(shown), 1))
            axis = figure.subplots()
            for position, layer in enumerate(shown):
                _plot_bar(axis, position, layer, theme)
            axis.axvline(self.share, color=theme.text, lw=1, ls=":", zorder=1)
            names = [layer.name for layer in shown]
            names = [name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names]
            axis.set_yticks(range(len(shown)), names)
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
            axis.grid(visible=False, axis="y")
            label = "share: fraction of the gradient's energy that GC removes\n"
            label += f"line: ± standard deviation over the batches; dotted: the whole model, {self.share:.0%}"
            if len(shown) < len(layers):
                label += f"; the {len(shown)} largest of {len(layers)} parameters"
            axis.set(xlabel=label, xlim=(0, 1.16), ylim=(len(shown) - 0.4, -0.6))
            return figure


def _plot_bar(axis: Any, position: int, layer: LayerReport, theme: Theme) -> None:
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


def _grouped(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Format (text, parameter) pairs as one paragraph per text, followed by its parameters."""
    lines = []
    for text in dict.fromkeys(text for text, _ in pairs):
        names = compact_names(name for other, name in pairs if other == text)
        lines.append(_wrapped(f"{text}: {', '.join(names)}", indent="  "))
    return "\n".join([title, *lines]) if lines else ""


def _wrapped(text: str, indent: str = "") -> str:
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 79, initial_indent=indent, subsequent_indent=indent and f"{indent}  ", **options)


def _formatted(value: float, spec: str = ".3g") -> str:
    return "–" if math.isnan(value) else f"{value:{spec}}"
