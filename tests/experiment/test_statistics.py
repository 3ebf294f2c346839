"""The statistics agree with closed forms, SciPy and simulation; verdicts claim no more than the interval supports."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradcentral.experiment.statistics import Paired, epochs_to_reach, interval_of_mean, paired
from gradcentral.experiment.verdict import Verdict, judge

BASE = [0.90, 0.92, 0.91, 0.90, 0.93]


def verdict(evidence: Paired, higher_is_better: bool = True) -> Verdict:
    return judge(evidence, optimizer="sgd", arm="gradient", metric="accuracy", higher_is_better=higher_is_better)


def test_closed_form_of_two_pairs() -> None:
    # With n = 2, t has one degree of freedom, the Cauchy distribution: its quantile is tan(π(q − ½)).
    result = paired([0.0, 0.0], [1.0, 3.0])
    assert result.mean == 2
    half = math.tan(math.pi * 0.475)  # se = √2 / √2 = 1
    assert result.interval == pytest.approx((2 - half, 2 + half))
    assert result.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)


@pytest.mark.parametrize("arms", [1, 2, 3])
def test_agrees_with_scipy(arms: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8))
    result, reference = paired(a.tolist(), b.tolist(), arms=arms), stats.ttest_rel(b, a)
    assert result.p == pytest.approx(min(1, arms * reference.pvalue))
    assert result.interval == pytest.approx(tuple(reference.confidence_interval(1 - 0.05 / arms)))


numbers = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12), st.integers(1, 4))
@settings(deadline=None)
def test_the_interval_excludes_zero_exactly_when_p_is_below_5_percent(
    pairs: list[tuple[float, float]], arms: int
) -> None:
    result = paired([a for a, _ in pairs], [b for _, b in pairs], arms=arms)
    if result.interval is None:
        assert result.p is None
    else:
        assert result.p is not None
        low, high = result.interval
        if abs(result.p - 0.05) > 1e-9:
            assert (low > 0 or high < 0) == (result.p < 0.05)


@given(st.lists(st.tuples(st.none() | numbers, st.none() | numbers), min_size=1, max_size=8), st.booleans())
@settings(deadline=None)
def test_no_sentence_claims_more_than_its_interval(
    pairs: list[tuple[float | None, float | None]], higher_is_better: bool
) -> None:
    result = paired([a for a, _ in pairs], [b for _, b in pairs], arms=2)
    found = verdict(result, higher_is_better)
    claims = found.outcome in ("better", "worse")
    excludes = result.interval is not None and (result.interval[0] > 0 or result.interval[1] < 0)
    assert not claims or excludes
    assert found.outcome != "better" or result.diverged <= result.baseline_diverged
    if claims:
        assert result.mean is not None
        assert (found.outcome == "better") == ((result.mean > 0) == higher_is_better)
    if result.diverged or result.baseline_diverged:
        assert "diverged" in found.sentence
    assert "nan" not in found.sentence


def test_family_wise_false_positives_stay_near_5_percent() -> None:
    rng, rounds, false = np.random.default_rng(1), 1500, 0
    for _ in range(rounds):
        seeds = rng.normal(size=5)  # the common component of the runs of one seed
        none, gradient, update = (seeds + 0.5 * rng.normal(size=5) for _ in range(3))
        false += any(
            verdict(paired(none.tolist(), arm.tolist(), arms=2)).outcome in ("better", "worse")
            for arm in (gradient, update)
        )
    # Bonferroni keeps it at 5% or a little below; 0.02 is three and a half standard errors.
    assert 0.025 < false / rounds < 0.07


def test_a_detectable_difference_is_detected_in_about_80_percent_of_experiments() -> None:
    rng, n, sigma = np.random.default_rng(2), 6, 0.3
    true = float(np.median([detectable(rng.normal(0, sigma, n)) for _ in range(200)]))
    found = sum(
        verdict(paired([0.0] * n, rng.normal(true, sigma, n).tolist(), arms=2)).outcome == "better" for _ in range(400)
    )
    assert 0.7 < found / 400 < 0.9


def detectable(differences: np.ndarray) -> float:
    result = paired([0.0] * len(differences), differences.tolist(), arms=2).detectable
    assert result is not None
    return result


def test_identical_runs_are_no_change() -> None:
    found = verdict(paired(BASE, BASE))
    assert found.outcome == "no change"
    assert found.evidence.interval is None
    assert found.sentence == "no change: accuracy is identical in all 5 pairs."


def test_equal_differences_are_inconclusive() -> None:
    # In floating point they differ in the last digit, which is not a measured spread.
    found = verdict(paired(BASE, [a + 0.01 for a in BASE]))
    assert found.evidence.p is None
    assert found.outcome == "inconclusive"
    assert "by the same +0.0100 in all 5 pairs" in found.sentence


def test_one_pair_is_inconclusive() -> None:
    found = verdict(paired([0.5], [0.9]))
    assert found.outcome == "inconclusive"
    assert "use more seeds" in found.sentence
    assert verdict(paired(BASE, [0.95, 0.98, 0.96, 0.94, 0.97])).outcome == "better"  # the remedy works


def test_no_clear_change_reports_the_detectable_difference() -> None:
    found = verdict(paired(BASE, [0.91, 0.91, 0.92, 0.89, 0.94], arms=2))
    assert found.outcome == "no clear change"
    assert found.evidence.detectable is not None
    assert f"a true difference of {found.evidence.detectable:.3f} would probably have been detected" in found.sentence
    assert "simultaneous for 2 arms" in found.sentence


def test_diverged_runs_are_reported_first_and_exclude_better() -> None:
    better = [a + d for a, d in zip(BASE, (0.030, 0.031, 0.029, 0.032, 0.030), strict=True)]
    assert verdict(paired(BASE, better)).outcome == "better"
    found = verdict(paired(BASE, [None, *better[1:]]))
    assert found.outcome == "diverges more often"
    assert found.sentence.startswith(
        "diverges more often: 1 of 5 runs diverged (without GC: 0); of the pairs that finished"
    )
    assert found.evidence.mean == pytest.approx(0.0305)
    found = verdict(paired([None, *BASE[1:]], better))
    assert found.outcome == "better"
    assert found.sentence.startswith("0 of 5 runs diverged (without GC: 1)")
    found = verdict(paired(BASE, [None, *(a - b for a, b in zip(BASE[1:], (0.2, 0.21, 0.22, 0.2), strict=True))]))
    assert found.outcome == "worse"
    found = verdict(paired(BASE, [None] * 5))
    assert found.sentence == "diverges more often: 5 of 5 runs diverged (without GC: 0), no pair finished."


def test_lower_is_better_reverses_the_verdict() -> None:
    result = paired([0.5, 0.6, 0.55], [0.4, 0.49, 0.46])
    assert verdict(result).outcome == "worse"
    assert verdict(result, higher_is_better=False).outcome == "better"


def test_unequal_lengths_and_numbers_of_arms_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="2 baseline runs cannot be paired with 1"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="arms: must be at least 1"):
        paired([1.0], [1.0], arms=0)


def test_epochs_to_reach() -> None:
    assert epochs_to_reach([0.9, None, 0.3, 0.1], 0.3) == 3
    assert epochs_to_reach([0.9, 0.8], 0.3) is None


def test_interval_of_mean() -> None:
    mean, low, high = interval_of_mean([1.0, 2.0, 4.0])
    reference = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (low, high) == pytest.approx(reference)
    assert interval_of_mean([3.0]) == (3, 3, 3)
