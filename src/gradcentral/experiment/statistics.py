"""Did it help? Student's t on paired differences, and a sentence that claims no more than the interval supports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradcentral.extras import optional

__all__ = ["Paired", "Verdict", "epochs_to_reach", "interval_of_mean", "judge", "mean_std", "paired"]

Outcome = Literal["better", "worse", "no clear change", "no change", "diverges more often", "can't tell"]

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Differences arm − baseline of runs paired by seed.

    Attributes:
        differences: of the pairs in which neither run diverged.
        mean: of the differences; None without any.
        interval: simultaneous 95% confidence interval of the mean for all arms; None where the differences have
            no spread to judge by (fewer than two of them, or all equal).
        p: two-sided p-value, corrected for the number of arms; None as for the interval. The interval excludes
            zero exactly when it is below 0.05.
        detectable: the smallest true difference that so many pairs with this spread would probably (80%) show.
        arms: how many arms are compared with the baseline.
        diverged: runs of the arm that diverged.
        baseline_diverged: runs of the baseline that diverged.
        pairs: seeds, diverged ones included.
    """

    differences: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    arms: int
    diverged: int
    baseline_diverged: int
    pairs: int


def paired(baseline: Sequence[float | None], arm: Sequence[float | None], *, arms: int = 1) -> Paired:
    """Compare runs that belong together one by one; None stands for a run that diverged.

    The interval is that of the paired t distribution, with Bonferroni's correction for ``arms`` arms.

    Raises:
        ValueError: the two have different lengths, or ``arms`` is below 1.

    Examples:
        >>> result = paired([0.90, 0.92, 0.91, 0.90], [0.93, 0.94, 0.95, 0.93])
        >>> round(result.mean, 3), round(result.p, 3)
        (0.03, 0.005)
    """
    if len(baseline) != len(arm):
        raise ValueError(f"{len(baseline)} baseline runs can't be paired with {len(arm)} runs of the arm")
    if arms < 1:
        raise ValueError(f"arms must be at least 1, not {arms}")
    both = [(a, b) for a, b in zip(baseline, arm, strict=True) if a is not None and b is not None]
    differences = tuple(b - a for a, b in both)
    interval = p = detectable = None
    n = len(differences)
    spread = statistics.stdev(differences) if n > 1 else 0.0
    # Differences of equal steps differ by rounding, which is no spread.
    if spread > 1e-12 * max((abs(x) for pair in both for x in pair), default=0.0):
        t = optional("scipy.stats").t
        mean, error, alpha = statistics.fmean(differences), spread / math.sqrt(n), LEVEL / arms
        critical = float(t.ppf(1 - alpha / 2, n - 1))
        interval = (mean - critical * error, mean + critical * error)
        p = min(1.0, arms * 2 * float(t.sf(abs(mean) / error, n - 1)))
        detectable = (critical + float(t.ppf(POWER, n - 1))) * error
    return Paired(
        differences=differences,
        mean=statistics.fmean(differences) if n else None,
        interval=interval,
        p=p,
        detectable=detectable,
        arms=arms,
        diverged=sum(x is None for x in arm),
        baseline_diverged=sum(x is None for x in baseline),
        pairs=len(arm),
    )


@dataclass(frozen=True)
class Verdict:
    """What the runs say about one arm under one optimizer.

    Attributes:
        optimizer, arm, metric: what was compared.
        outcome: in a word or three.
        sentence: the same with its evidence.
        evidence: the numbers.
    """

    optimizer: str
    arm: str
    metric: str
    outcome: Outcome
    sentence: str
    evidence: Paired

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.arm}: {self.sentence}"


def judge(
    evidence: Paired, *, optimizer: str, arm: str, metric: str, higher_is_better: bool, baseline: str = "none"
) -> Verdict:
    """Put the evidence into words.

    Examples:
        >>> evidence = paired([0.90, 0.92, 0.91, 0.90], [0.93, 0.94, 0.95, 0.93])
        >>> judge(evidence, optimizer="sgd", arm="gradient", metric="accuracy", higher_is_better=True).sentence
        'better: accuracy higher by 0.030, 95% interval +0.017 to +0.043, p = 0.0052, 4 pairs.'
    """
    outcome = _outcome(evidence, higher_is_better)
    parts = [_claim(evidence, outcome, metric)]
    if evidence.diverged or evidence.baseline_diverged:
        count = f"{evidence.diverged} of {evidence.pairs} runs diverged ({baseline}: {evidence.baseline_diverged})"
        parts.insert(0, f"{count}; of the pairs that finished")
        sentence = ", ".join(parts) if evidence.differences else f"{count}, no pair finished."
        if outcome == "diverges more often":
            sentence = f"diverges more often: {sentence}"
    else:
        sentence = parts[0]
    return Verdict(optimizer, arm, metric, outcome, sentence, evidence)


def _outcome(evidence: Paired, higher_is_better: bool) -> Outcome:
    better = None
    if evidence.interval is not None and evidence.mean is not None and _excludes_zero(evidence):
        better = (evidence.mean > 0) == higher_is_better
    if better is False:
        return "worse"
    if evidence.diverged > evidence.baseline_diverged:
        return "diverges more often"
    if better:
        return "better"
    if evidence.interval is not None:
        return "no clear change"
    return "no change" if len(evidence.differences) > 1 and not any(evidence.differences) else "can't tell"


def _claim(evidence: Paired, outcome: Outcome, metric: str) -> str:
    n = len(evidence.differences)
    pairs = f"{n} pair{'s' if n != 1 else ''}"
    if evidence.mean is None:
        return "no pair finished."
    if evidence.interval is None:
        places = _places(abs(evidence.mean) / 10)
        if n == 1:
            return f"can't tell from 1 pair ({metric} {_signed(evidence.mean, places)}); use more seeds."
        if not any(evidence.differences):
            return f"no change: {metric} is identical in all {pairs}."
        return (
            f"can't tell: {metric} differs by the same {_signed(evidence.mean, places)} in all {pairs}, "
            "which leaves no spread to judge by; use more seeds."
        )
    assert evidence.p is not None
    assert evidence.detectable is not None
    low, high = evidence.interval
    places = _places((high - low) / 2)
    simultaneous = f" (simultaneous for {evidence.arms} arms)" if evidence.arms > 1 else ""
    interval = (
        f"95% interval {_signed(low, places)} to {_signed(high, places)}{simultaneous}, p = {_p(evidence.p)}, {pairs}"
    )
    if not _excludes_zero(evidence):
        return (
            f"no clear change: {metric} {_signed(evidence.mean, places)}, {interval}; "
            f"a true difference of {evidence.detectable:.{places}f} would probably have shown (power 80%)."
        )
    direction = "higher" if evidence.mean > 0 else "lower"
    claim = f"{metric} {direction} by {abs(evidence.mean):.{places}f}, {interval}."
    return claim if outcome == "diverges more often" else f"{outcome}: {claim}"


def _excludes_zero(evidence: Paired) -> bool:
    return evidence.p is not None and evidence.p < LEVEL


def _places(size: float) -> int:
    """Decimals that give a number of this size two digits.

    >>> _places(0.013), _places(3.0), _places(250.0)
    (3, 1, 0)
    """
    return min(12, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 0


def _signed(value: float, places: int) -> str:
    """With its sign, but no minus before zero.

    >>> _signed(0.012, 2), _signed(-0.001, 2)
    ('+0.01', '+0.00')
    """
    return f"{round(value, places) + 0.0:+.{places}f}"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.0001 else f"{p:.0e}"


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have.

    >>> mean_std([1.0, 2.0, 3.0]), mean_std([1.0])
    ((2.0, 1.0), (1.0, None))
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval_of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with the ends of its 95% confidence interval, for plots; one value is its own interval."""
    mean, std = mean_std(values)
    if std is None:
        return mean, mean, mean
    half = float(optional("scipy.stats").t.ppf(1 - LEVEL / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean, mean - half, mean + half


def epochs_to_reach(losses: Sequence[float | None], target: float) -> int | None:
    """The first epoch, counted from 1, whose loss is the target or below; None if it never is.

    >>> epochs_to_reach([0.9, 0.5, 0.2], 0.5), epochs_to_reach([0.9], 0.5)
    (2, None)
    """
    return next((epoch for epoch, loss in enumerate(losses, 1) if loss is not None and loss <= target), None)
