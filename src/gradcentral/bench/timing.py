"""Interleaved timing of alternatives, compared by the median of paired ratios."""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Call", "Clock", "Ratio", "clock_for", "interleave", "ratio"]

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # returns the seconds that a number of calls take

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


def clock_for(device: str) -> Clock:
    """Return the clock that times calls on a device: events of its stream on CUDA, otherwise the host's clock."""
    return _event_seconds if device.startswith("cuda") else _host_seconds


def _host_seconds(run: Call, count: int) -> float:
    return timeit.timeit(run, number=count)  # timeit disables the garbage collector


def _event_seconds(run: Call, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    timeit.timeit(run, start.record, number=count)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def interleave(
    runs: Mapping[str, Call], rounds: int, budget: float = math.inf, warm_up: int = 3, clock: Clock = _host_seconds
) -> dict[str, list[float]]:
    """Time every alternative once per round, in an order that rotates, and return the seconds per call in each round.

    No new round starts after ``budget`` seconds, except to complete three rounds. A fast alternative is called several
    times per measurement.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(warm_up):
            run()
        repeats[name] = max(1, round(_MIN_SECONDS / max(clock(run, 1), 1e-7)))
    order = deque(runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= _MIN_ROUNDS and time.perf_counter() - started > budget:
            break
        for name in order:
            seconds[name].append(clock(runs[name], repeats[name]) / repeats[name])
        order.rotate(-1)
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
