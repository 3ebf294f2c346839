"""The cost of `Monitor` per iteration, as the benchmark reports it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from torch import nn

from gradcentral.bench import Benchmark, Case, benchmark, iteration
from gradcentral.bench.report import conclusion
from gradcentral.bench.steps import OURS
from gradcentral.bench.timing import Ratio


def test_the_conclusion_includes_the_cost_of_monitoring_if_measured() -> None:
    case = Case("tiny CNN", "f32", "SGD", 1.0, {OURS: Ratio(0.8, 0.7, 0.9)}, noise=0.02)
    assert "Monitor" not in conclusion(Benchmark([case]))
    watched = dataclasses.replace(case, monitoring={"ResNet-18": 0.00064, "three layers of 32": 0.0055})
    expected = "Monitor adds to an iteration at its default interval: 0.06% (ResNet-18), 0.55% (three layers of 32)."
    assert expected in conclusion(Benchmark([case, watched]))


def test_monitoring_is_measured_on_a_large_and_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "resnet18", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    case = iteration(rounds=3, batch=2)
    assert list(case.monitoring) == ["ResNet-18", "three layers of 32"]
    assert all(map(math.isfinite, case.monitoring.values()))
