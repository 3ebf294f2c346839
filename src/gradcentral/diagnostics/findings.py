"""Numbers into plain words: what a share means for a layer and for a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.diagnostics.input_means import InputMean
from gradcentral.weight_vectors import WeightVectors

__all__ = [
    "ACTS",
    "ERASES",
    "LEFT_ALONE",
    "NOT_FINITE",
    "NO_GRADIENT",
    "NO_OP",
    "Finding",
    "finding_of_layer",
    "finding_of_model",
]

NO_OP, ACTS, ERASES = "no-op", "acts", "near-erasure"
LEFT_ALONE, NO_GRADIENT, NOT_FINITE = "left alone", "no gradient", "not finite"

# Below one percent of the energy the step's direction turns by less than six degrees; above nine tenths less than a
# third of the gradient's length is left.
_FEW, _MOST = 0.01, 0.9
_CENTERED, _CONSTANT = 0.02, 0.8


class Finding(NamedTuple):
    """One of the kinds, and a sentence."""

    kind: str
    text: str
    constant_input: bool = False
    """Whether the layer's input is little but its mean."""


def finding_of_layer(
    vectors: WeightVectors | None, reason: str, effects: Sequence[Effect], share: float, x: InputMean | None
) -> Finding:
    """What centering does to one parameter, and why where the layer's input tells."""
    if vectors is None:
        return Finding(LEFT_ALONE, f"left alone: {reason}")
    if not all(math.isfinite(effect.norm) for effect in effects):
        return Finding(NOT_FINITE, "not finite: its gradient has NaN or Inf, so nothing can be said")
    if not any(effect.norm > 0 for effect in effects):
        return Finding(NO_GRADIENT, "no gradient: the loss does not reach it in these batches")
    offset = None if x is None or math.isnan(x.offset) else x.offset
    if share < _FEW:
        if offset is None:
            return Finding(NO_OP, NO_OP)
        centered = offset < _CENTERED
        cause = (
            "its input is centered already (as after LayerNorm)" if centered else "what its input's mean adds cancels"
        )
        return Finding(NO_OP, f"{NO_OP}: {cause}")
    kind = ACTS if share <= _MOST else ERASES
    if offset is None:
        return Finding(kind, kind)
    text = f"{kind}: {offset:.0%} of its input's energy is their mean"
    if kind == ACTS:
        return Finding(kind, text)
    if offset > _CONSTANT:
        return Finding(kind, f"{text}, as after a sigmoid", constant_input=True)
    return Finding(kind, f"{text}, and over the batch the rest cancels")


def finding_of_model(share: float, findings: Sequence[Finding]) -> str:
    """What centering does to a model, from the findings on its centered parameters."""
    kinds = [finding.kind for finding in findings]
    if not kinds:
        return "GC centers nothing here: every parameter is left alone."
    if math.isnan(share):
        return "Nothing can be said: gradients are not finite."
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    words = {ACTS: "acts on", NO_OP: "is a no-op on", ERASES: "nearly erases", NO_GRADIENT: "meets no gradient on"}
    parts = [f"{verb} {count[kind]}" for kind, verb in words.items() if kind in count]
    text = f"GC removes {share:.1%} of the whole gradient's energy: of {len(kinds)} centered parameters it "
    text += f"{', '.join(parts)}."
    if count.keys() <= {NO_OP, NO_GRADIENT}:
        return (
            f"{text} With placement gradient it would change next to nothing in this model; update still keeps weight "
            "decay and adaptive steps from moving the means."
        )
    if any(finding.constant_input for finding in findings):
        text += " Where an input is little but its mean, centering that input may do more than GC."
    return f"{text} This says where GC acts, not whether it helps: for that there is gradcentral compare."
