"""Student's t-test on paired differences between the runs of an arm and those of the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gradcentral.extras import optional

__all__ = ["Paired", "epochs_to_reach", "interval_of_mean", "mean_std", "paired"]

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Differences arm − baseline between runs paired by seed.

    Attributes:
        differences: one per pair in which neither run diverged and both numbers are finite.
        mean: mean of the differences; None if there are none.
        interval: 95% confidence interval of the mean, simultaneous for all arms; None, as are ``p`` and
            ``detectable``, if the spread cannot be estimated (there are fewer than two differences, or all are equal).
        p: two-sided p-value, corrected for the number of arms, below 0.05 if and only if the interval excludes zero.
        detectable: the smallest true difference that this many pairs with this spread would detect with 80% power.
        arms: number of arms that are compared with the baseline.
        diverged, baseline_diverged: number of runs of the arm and of the baseline that diverged.
        undefined: number of pairs in which neither run diverged, but a number is not finite.
        pairs: number of seeds, including those with a diverged run.
    """

    differences: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    arms: int
    diverged: int
    baseline_diverged: int
    undefined: int
    pairs: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.p is not None and self.p < LEVEL


def paired(baseline: Sequence[float | None], arm: Sequence[float | None], *, arms: int = 1) -> Paired:
    """Compare the runs of an arm with those of the baseline by a paired t-test, Bonferroni-corrected for the arms.

    Args:
        baseline: one number per seed; None for a run that diverged, and a number that is not finite, such as NaN, for
            one that finished without a defined result.
        arm: one number per seed, in the same order.
        arms: number of arms that are compared with this baseline.

    Raises:
        ValueError: the two have different lengths, or ``arms`` is below 1.

    Examples:
        >>> result = paired([0.90, 0.92, 0.91, 0.90], [0.93, 0.94, 0.95, 0.93])
        >>> round(result.mean, 3), round(result.p, 3)
        (0.03, 0.005)
    """
    if len(baseline) != len(arm):
        raise ValueError(f"{len(baseline)} baseline runs cannot be paired with {len(arm)} runs of the arm")
    if arms < 1:
        raise ValueError(f"arms: must be at least 1, not {arms}")
    finished = [(a, b) for a, b in zip(baseline, arm, strict=True) if a is not None and b is not None]
    both = [pair for pair in finished if all(map(math.isfinite, pair))]
    differences = tuple(b - a for a, b in both)
    mean, std = mean_std(differences) if both else (None, None)
    interval = p = detectable = None
    # Mathematically equal differences vary by rounding errors, which must not be taken for a measured spread.
    if std is not None and std > 1e-12 * max(abs(x) for pair in both for x in pair):
        scipy = optional("scipy.stats")
        test = scipy.ttest_1samp(differences, 0)
        low, high = map(float, test.confidence_interval(1 - LEVEL / arms))
        interval, p = (low, high), min(1.0, arms * float(test.pvalue))
        error = std / math.sqrt(len(differences))
        detectable = (high - low) / 2 + float(scipy.t.ppf(POWER, len(differences) - 1)) * error
    diverged, baseline_diverged = arm.count(None), baseline.count(None)
    counts = diverged, baseline_diverged, len(finished) - len(both), len(arm)
    return Paired(differences, mean, interval, p, detectable, arms, *counts)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for a single value.

    >>> mean_std([1.0, 2.0, 3.0]), mean_std([1.0])
    ((2.0, 1.0), (1.0, None))
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval_of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95% confidence interval; all three are equal for a single value."""
    mean, std = mean_std(values)
    critical = float(optional("scipy.stats").t.ppf(1 - LEVEL / 2, max(1, len(values) - 1)))
    half = critical * (std or 0.0) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def epochs_to_reach(losses: Sequence[float | None], target: float) -> int | None:
    """Return the first epoch, counted from 1, with a loss of at most ``target``; None if there is none."""
    return next((epoch for epoch, loss in enumerate(losses, 1) if loss is not None and loss <= target), None)
