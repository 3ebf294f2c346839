"""The statistics of `evidence.py`: paired effects per cell, summaries per kind of model, and what predicts the effect.

The effect of an arm is the relative reduction of the test error, in percent, compared with the run of the same seed
without GC: 100 (e_none − e_arm) / mean(e_none). The test error is 1 − accuracy, the squared error, or the bits per
character. Positive effects are improvements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from evidence_runs import FACTORS, Cell, arms_of

from gradcentral.experiment.arms import NONE
from gradcentral.experiment.statistics import epochs_to_reach
from gradcentral.experiment.tasks import SUITE
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS
from gradcentral.extras import optional

__all__ = [
    "FRESH_SEEDS",
    "KINDS",
    "Correlation",
    "Effect",
    "Speed",
    "cells",
    "confirmations",
    "final_error",
    "holm",
    "kinds",
    "means_of",
    "pooled",
    "share_correlation",
    "speeds",
    "strongest",
]

Record = dict[str, Any]
LEVEL = 0.05
FRESH_SEEDS = range(5000, 5010)
CONFIRMED_FINDINGS = 3
RESAMPLES = 2000
ROUNDING = 1e-9  # percent; a smaller standard error is not a measured spread

KINDS = {
    "fashion-none": "CNN without normalization",
    "autoencoder": "convolutional autoencoder",
    "fashion-batchnorm": "CNN with BatchNorm",
    "fashion-groupnorm": "CNN with GroupNorm or LayerNorm",
    "fashion-layernorm": "CNN with GroupNorm or LayerNorm",
    "fine-tuning": "fine-tuning a CNN with BatchNorm",
    "lora": "fine-tuning a transformer with LoRA",
    "text-layernorm": "transformer with LayerNorm or RMSNorm",
    "text-rmsnorm": "transformer with LayerNorm or RMSNorm",
    "text-gru": "GRU",
    "tabular-relu": "linear layers with ReLU",
    "tabular-sigmoid": "linear layers with sigmoid",
}
"""Task -> the kind of model that its results are summarized under."""


class Effect(NamedTuple):
    """The mean effect of an arm, in percent of the error without GC, with its 95% interval.

    ``p`` is two-sided; ``p_holm`` is corrected for all effects that were computed together. The interval and both are
    None if the spread cannot be estimated. The mean is that of the pairs in which no run diverged; ``diverged`` and
    ``baseline_diverged`` count the runs of the arm and without GC that did.
    """

    name: str
    optimizer: str
    arm: str
    pairs: int
    mean: float
    error: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    diverged: int = 0
    baseline_diverged: int = 0

    @property
    def significant(self) -> bool:
        """Whether the effect differs from zero after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL

    @property
    def verdict(self) -> str:
        """``"helps"``, ``"hurts"``, ``"diverges more often"`` or ``"no clear effect"``."""
        if self.diverged > self.baseline_diverged:
            return "diverges more often"
        return ("helps" if self.mean > 0 else "hurts") if self.significant else "no clear effect"


class Correlation(NamedTuple):
    """Spearman's correlation with a 95% interval, from resampling whole tasks."""

    value: float
    low: float
    high: float
    cells: int
    tasks: int


def final_error(record: Record) -> float | None:
    """Return the final test error; None if the run diverged or its metric is not finite."""
    final: float | None = record["test_metric"][-1] if record["diverged_at"] is None else None
    if final is None:
        return None
    return 1 - final if record["higher_is_better"] else final


def _by_cell(records: Iterable[Record]) -> dict[tuple[str, str, str, float], dict[int, Record]]:
    found: dict[tuple[str, str, str, float], dict[int, Record]] = defaultdict(dict)
    for record in records:
        found[record["task"], record["optimizer"], record["arm"], record["factor"]][record["seed"]] = record
    return found


def cells(records: Iterable[Record], factors: Sequence[float] = FACTORS[:1]) -> list[Effect]:
    """Return the effect of each task, optimizer and arm, on the mean error over some factors of the learning rate."""
    stats = optional("scipy.stats")
    effects = []
    for effect in _effects(records, factors):
        if effect.error > 0:
            half = effect.error * float(stats.t.ppf(1 - LEVEL / 2, effect.pairs - 1))
            p = 2 * float(stats.t.sf(abs(effect.mean) / effect.error, effect.pairs - 1))
            effect = effect._replace(interval=(effect.mean - half, effect.mean + half), p=p)
        effects.append(effect)
    return holm(effects)


def _effects(records: Iterable[Record], factors: Sequence[float] = FACTORS[:1]) -> Iterator[Effect]:
    """Yield the effect of each cell and its standard error, which is 0 if the spread cannot be estimated."""
    found = _by_cell(records)
    for task in SUITE:
        for optimizer in OPTIMIZERS:
            for arm in arms_of(optimizer)[1:]:
                pairs, diverged, baseline_diverged = [], 0, 0
                for seed in sorted(found[task, optimizer, arm, factors[0]]):
                    runs = [[found[task, optimizer, a, f].get(seed) for f in factors] for a in (NONE, arm)]
                    if any(run is None for some in runs for run in some):
                        continue
                    errors = [[final_error(run) for run in some if run is not None] for some in runs]
                    none, other = ([e for e in some if e is not None] for some in errors)
                    baseline_diverged += len(factors) - len(none)
                    diverged += len(factors) - len(other)
                    if len(none) == len(other) == len(factors):
                        pairs.append((fmean(none), fmean(other)))
                lost = Effect(
                    task, optimizer, arm, 0, math.nan, 0.0, diverged=diverged, baseline_diverged=baseline_diverged
                )
                if not pairs and (diverged or baseline_diverged):
                    yield lost
                elif pairs:
                    baseline = fmean(none for none, _ in pairs)
                    differences = [100 * (none - other) / baseline for none, other in pairs]
                    error = stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
                    error = error if error > ROUNDING else 0.0
                    yield lost._replace(pairs=len(pairs), mean=fmean(differences), error=error)


def holm(effects: Sequence[Effect]) -> list[Effect]:
    """Correct the p-values for their number by Holm's method."""
    order = sorted((i for i, effect in enumerate(effects) if effect.p is not None), key=lambda i: effects[i].p or 0.0)
    corrected, largest = list(effects), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (effects[i].p or 0.0)))
        corrected[i] = effects[i]._replace(p_holm=largest)
    return corrected


def pooled(name: str, arm: str, effects: Sequence[Effect]) -> Effect | None:
    """Summarize cells by a random-effects model; None for fewer than two cells with a known spread.

    DerSimonian and Laird's estimate of the variance between cells, and Hartung and Knapp's interval, which is Student's
    with one degree of freedom fewer than cells.
    """
    stats = optional("scipy.stats")
    known = [effect for effect in effects if effect.error > 0]
    if len(known) < 2:
        return None
    means, variances = np.array([e.mean for e in known]), np.array([e.error**2 for e in known])
    weights = 1 / variances
    fixed = float((weights * means).sum() / weights.sum())
    q, freedom = float((weights * (means - fixed) ** 2).sum()), len(known) - 1
    between = max(0.0, (q - freedom) / float(weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (variances + between)
    mean = float((weights * means).sum() / weights.sum())
    # Not below the usual standard error, as a few cells may agree by chance.
    scale = max(1.0, float((weights * (means - mean) ** 2).sum()) / freedom)
    error = math.sqrt(scale / float(weights.sum()))
    half = error * float(stats.t.ppf(1 - LEVEL / 2, freedom))
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    lost, baseline_lost = (
        sum(effect.diverged for effect in effects),
        sum(effect.baseline_diverged for effect in effects),
    )
    interval = mean - half, mean + half
    return Effect(name, "", arm, len(known), mean, error, interval, p, diverged=lost, baseline_diverged=baseline_lost)


def kinds(effects: Sequence[Effect], arms: Sequence[str] = ("gradient", "update")) -> list[Effect]:
    """Summarize the cells of each kind of model, over its tasks and optimizers; ``pairs`` is the number of cells."""
    found = []
    for kind in dict.fromkeys(KINDS.values()):
        for arm in arms:
            some = [effect for effect in effects if KINDS[effect.name] == kind and effect.arm == arm]
            if (summary := pooled(kind, arm, some)) is not None:
                found.append(summary)
    return holm(found)


def share_correlation(
    effects: Sequence[Effect], shares: dict[str, float], arm: str, value: Callable[[Effect], float]
) -> Correlation | None:
    """Correlate a number of each cell with the share before training; None for fewer than three tasks."""
    some = [e for e in effects if e.arm == arm and e.name in shares and not math.isnan(e.mean)]
    tasks = sorted({effect.name for effect in some})
    if len(tasks) < 3:
        return None
    stats = optional("scipy.stats")
    by_task = {task: [value(effect) for effect in some if effect.name == task] for task in tasks}

    def spearman(chosen: Sequence[str]) -> float:
        x = [shares[task] for task in chosen for _ in by_task[task]]
        y = [number for task in chosen for number in by_task[task]]
        if len({*x}) < 2 or len({*y}) < 2:
            return math.nan
        return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])

    random = np.random.default_rng(0)
    # Whole tasks, since the cells of a task share their share.
    draws = (spearman([tasks[i] for i in random.integers(len(tasks), size=len(tasks))]) for _ in range(RESAMPLES))
    low, high = np.quantile([draw for draw in draws if not math.isnan(draw)], [LEVEL / 2, 1 - LEVEL / 2])
    return Correlation(spearman(tasks), float(low), float(high), len(some), len(tasks))


class Speed(NamedTuple):
    """How soon runs reach the final training loss of the baseline's run, as a fraction of its epochs."""

    kind: str
    arm: str
    fraction: float | None
    never: float
    runs: int


def speeds(records: Iterable[Record], arms: Sequence[str] = ("gradient", "update")) -> list[Speed]:
    """Measure for each kind when the baseline's final training loss is reached at the best learning rate.

    ``fraction`` is the median over the runs that reach it, and ``never`` the fraction of those that do not.
    """
    found = _by_cell(records)
    epochs: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for (task, optimizer, arm, factor), runs in found.items():
        for seed, run in runs.items():
            baseline = found[task, optimizer, NONE, factor].get(seed) if arm in arms and factor == 1 else None
            if baseline is not None and baseline["diverged_at"] is None:
                reached = epochs_to_reach(run["train_loss"], baseline["train_loss"][-1])
                fraction = None if reached is None else reached / len(baseline["train_loss"])
                epochs[KINDS[task], arm].append(fraction)
    rows = []
    for kind in dict.fromkeys(KINDS.values()):
        for arm in arms:
            if some := epochs.get((kind, arm)):
                reached_by = [fraction for fraction in some if fraction is not None]
                never = 1 - len(reached_by) / len(some)
                rows.append(Speed(kind, arm, median(reached_by) if reached_by else None, never, len(some)))
    return rows


def means_of(records: Iterable[Record], name: str) -> dict[tuple[str, str, str], float]:
    """Return the mean of a number such as ``"drift"`` or ``"dead"`` for each task, optimizer and arm."""
    found = {
        (task, optimizer, arm): [run[name] for run in runs.values() if run[name] is not None]
        for (task, optimizer, arm, factor), runs in _by_cell(records).items()
        if factor == 1
    }
    return {key: fmean(values) for key, values in found.items() if values}


def strongest(records: Sequence[Record]) -> list[Cell]:
    """Return runs on fresh seeds for the findings with the largest |t|, at most one per task and optimizer.

    Only cells with the largest number of pairs count, since |t| orders them as their p-values do.
    """
    effects = [effect for effect in _effects(records) if effect.error > 0]
    most = max((effect.pairs for effect in effects), default=0)
    chosen: dict[tuple[str, str], Effect] = {}
    for effect in sorted(effects, key=lambda effect: -abs(effect.mean) / effect.error):
        if effect.pairs == most and len(chosen) < CONFIRMED_FINDINGS:
            chosen.setdefault((effect.name, effect.optimizer), effect)
    found = _by_cell(records)
    runs = []
    for (task, optimizer), effect in chosen.items():
        rates = next(iter(found[task, optimizer, NONE, 1.0].values()))
        for seed in FRESH_SEEDS:
            for arm in (NONE, effect.arm):
                runs.append(Cell(task, optimizer, arm, 1.0, seed, rates["lr"], rates["weight_decay"]))
    return runs


def confirmations(records: Sequence[Record], fresh: Sequence[Record]) -> list[tuple[Effect, Effect]]:
    """Return each finding that was repeated, with the effect on the fresh seeds, corrected for their number."""
    first = {(effect.name, effect.optimizer, effect.arm): effect for effect in cells(records)}
    return [(first[again.name, again.optimizer, again.arm], again) for again in cells(fresh)]
