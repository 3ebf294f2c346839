"""Interleaved timing of alternatives, compared by the median of paired ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Clock", "Ratio", "host_seconds", "interleave", "ratio"]

Clock = Callable[[Callable[[], object], int], float]
"""Returns how many seconds a number of calls take."""

# A shorter measurement would be dominated by the clock's resolution and by the wake-up of threads.
_MIN_SECONDS = 2e-3
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """The time of one alternative over that of another: median and quartiles of the paired ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def host_seconds(run: Callable[[], object], count: int) -> float:
    """Time calls with the host's clock."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - started


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float = float("inf"),
    warm_up: int = 3,
    clock: Clock = host_seconds,
) -> dict[str, list[float]]:
    """Time every alternative once per round, in an order that rotates from round to round.

    A fast alternative is called several times per measurement.

    Args:
        runs: alternatives by name.
        rounds: maximum number of measurements per alternative.
        budget: seconds after which no new round starts; at least three rounds are run.
        warm_up: number of calls of each alternative before the first measurement.
        clock: times the calls.

    Returns:
        For each alternative, the seconds per call in each round.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(warm_up):
            run()
        repeats[name] = max(1, round(_MIN_SECONDS / max(clock(run, 1), 1e-7)))
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(rounds):
            if turn >= _MIN_ROUNDS and time.perf_counter() - started > budget:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(clock(runs[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Divide two lists of times round by round.

    Examples:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).median
        0.5
    """
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(median, low, high)
