"""The finding for one parameter: how much of its gradient centering removes, and why."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.diagnostics.input_means import InputMean
from gradcentral.weight_vectors import WeightVectors

__all__ = ["NEAR_TOTAL", "NON_FINITE", "NO_EFFECT", "NO_GRADIENT", "PARTIAL", "SKIPPED", "LayerReport"]

NO_EFFECT, PARTIAL, NEAR_TOTAL = "no effect", "partial", "near-total"
SKIPPED, NO_GRADIENT, NON_FINITE = "skipped", "no gradient", "non-finite"

# A share below 1 % turns the gradient by less than 6 degrees; one above 90 % leaves less than a third of its length.
_NO_EFFECT_BELOW, _NEAR_TOTAL_ABOVE = 0.01, 0.9
_CENTERED_BELOW, _CONSTANT_ABOVE = 0.02, 0.8
_CAUSES = {
    NON_FINITE: "its gradient contains NaN or Inf",
    NO_GRADIENT: "the loss of these batches does not depend on it",
}


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
        return statistics.stdev(e.share for e in self.effects) if len(self.effects) > 1 else 0.0

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
        cause = self._cause()
        return f"{self.kind}: {cause}" if cause else self.kind

    @property
    def has_constant_input(self) -> bool:
        """Whether centering removes nearly everything because the layer's input is nearly constant."""
        return self.kind == NEAR_TOTAL and self.input is not None and self.input.offset > _CONSTANT_ABOVE

    def _cause(self) -> str:
        if self.kind in _CAUSES:
            return _CAUSES[self.kind]
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
