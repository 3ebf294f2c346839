"""Times of alternatives in one process, interleaved, as medians of paired ratios with their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Clock", "Ratio", "host_seconds", "interleave", "ratio"]

Clock = Callable[[Callable[[], object], int], float]
"""Seconds of so many calls."""

_AT_LEAST = 2e-3  # seconds: a clock reading and a thread's wake-up are lost in that


@dataclass(frozen=True)
class Ratio:
    """One alternative's time over another's: the median of the pairs and their quartiles."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def host_seconds(run: Callable[[], object], count: int) -> float:
    """By the clock of the host."""
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
    """Seconds of one call of each alternative, once a round, in an order that rotates.

    Args:
        runs: the alternatives.
        rounds: how often each is measured.
        budget: seconds after which no new round starts (three are always made).
        warm_up: unmeasured calls of each at first.
        clock: what times the calls.

    What is quick is called several times for one measurement.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(warm_up):
            run()
        repeats[name] = max(1, round(_AT_LEAST / max(clock(run, 1), 1e-7)))
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        begun = time.perf_counter()
        for turn in range(rounds):
            if turn >= 3 and time.perf_counter() - begun > budget:
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(clock(runs[name], repeats[name]) / repeats[name])
    finally:
        if enabled:
            gc.enable()
    return seconds


def ratio(one: list[float], other: list[float]) -> Ratio:
    """One over the other, round by round.

    Examples:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).median
        0.5
    """
    pairs = [a / b for a, b in zip(one, other, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(median, low, high)
