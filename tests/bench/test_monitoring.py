from __future__ import annotations

import dataclasses

from gradcentral.bench import Benchmark, Case
from gradcentral.bench.steps import OURS
from gradcentral.bench.table import verdict
from gradcentral.bench.timing import Ratio


def test_the_verdict_says_what_monitoring_adds_where_it_was_measured() -> None:
    case = Case("tiny CNN", "f32", "SGD", 1.0, {OURS: Ratio(0.8, 0.7, 0.9)}, noise=0.02)
    assert "Monitor" not in verdict(Benchmark([case]))
    watched = dataclasses.replace(case, monitoring=0.00064)
    assert "Monitor adds 0.06% to an iteration at its default interval." in verdict(Benchmark([case, watched]))
