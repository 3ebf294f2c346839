"""The wording of a verdict: one sentence that claims no more than the confidence interval supports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gradcentral.experiment.statistics import Paired

__all__ = ["Verdict", "judge"]

Outcome = Literal["better", "worse", "no clear change", "no change", "diverges more often", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm under one optimizer: the outcome in words, and a sentence with the evidence."""

    optimizer: str
    arm: str
    metric: str
    outcome: Outcome
    sentence: str
    evidence: Paired

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.arm}: {self.sentence}"


def judge(evidence: Paired, optimizer: str, arm: str, metric: str, higher_is_better: bool) -> Verdict:
    """Put the evidence into words.

    Examples:
        >>> from gradcentral.experiment.statistics import paired
        >>> evidence = paired([0.90, 0.92, 0.91, 0.90], [0.93, 0.94, 0.95, 0.93])
        >>> judge(evidence, optimizer="sgd", arm="gradient", metric="accuracy", higher_is_better=True).sentence
        'better: accuracy higher by 0.030, 95% interval +0.017 to +0.043, p = 0.0052, 4 pairs.'
    """
    outcome = _outcome(evidence, higher_is_better)
    sentence = _claim(evidence, outcome, metric)
    causes = []
    if evidence.diverged or evidence.baseline_diverged:
        more = "diverges more often: " if outcome == "diverges more often" else ""
        diverged = f"{evidence.diverged} of {evidence.pairs} runs diverged (without GC: {evidence.baseline_diverged})"
        causes.append(more + diverged)
    if evidence.undefined:
        causes.append(f"{metric} is not finite in {evidence.undefined} of {evidence.pairs} pairs")
    if causes:
        kept = "the pairs that finished" if not evidence.undefined else "the other pairs"
        none = ", no pair finished." if not evidence.undefined else ", no pair can be compared."
        sentence = " and ".join(causes) + (f"; of {kept}, {sentence}" if evidence.differences else none)
    return Verdict(optimizer, arm, metric, outcome, sentence, evidence)


def _outcome(evidence: Paired, higher_is_better: bool) -> Outcome:
    improved = evidence.mean is not None and (evidence.mean > 0) == higher_is_better
    if evidence.significant and not improved:
        return "worse"
    if evidence.diverged > evidence.baseline_diverged:
        return "diverges more often"
    if evidence.interval is not None:
        return "better" if evidence.significant else "no clear change"
    return "no change" if len(evidence.differences) > 1 and not any(evidence.differences) else "inconclusive"


def _claim(evidence: Paired, outcome: Outcome, metric: str) -> str:
    n, mean = len(evidence.differences), evidence.mean
    if mean is None:
        return "no pair finished."
    if evidence.interval is None or evidence.p is None or evidence.detectable is None:
        change = _signed(mean, _places(abs(mean) / 10))
        if n == 1:
            return f"inconclusive: one pair gives no estimate of the spread ({metric} {change}); use more seeds."
        if not any(evidence.differences):
            return f"no change: {metric} is identical in all {n} pairs."
        return (
            f"inconclusive: {metric} differs by the same {change} in all {n} pairs, "
            "so the spread cannot be estimated; use more seeds."
        )
    low, high = evidence.interval
    places = _places((high - low) / 2)
    simultaneous = f" (simultaneous for {evidence.arms} arms)" if evidence.arms > 1 else ""
    p = f"{evidence.p:.2g}" if evidence.p >= 0.0001 else f"{evidence.p:.0e}"
    interval = f"95% interval {_signed(low, places)} to {_signed(high, places)}{simultaneous}, p = {p}, {n} pairs"
    if not evidence.significant:
        return (
            f"no clear change: {metric} {_signed(mean, places)}, {interval}; "
            f"a true difference of {evidence.detectable:.{places}f} would probably have been detected (80% power)."
        )
    claim = f"{metric} {'higher' if mean > 0 else 'lower'} by {abs(mean):.{places}f}, {interval}."
    return claim if outcome == "diverges more often" else f"{outcome}: {claim}"


def _places(size: float) -> int:
    """Return the number of decimals that shows two significant digits of a number of this size."""
    return min(12, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 0


def _signed(value: float, places: int) -> str:
    """Format a number with its sign, without a minus before zero."""
    return f"{round(value, places) + 0.0:+.{places}f}"
