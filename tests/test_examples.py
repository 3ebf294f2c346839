"""The examples run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradcentral.experiment import compare

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_wine_runs(tmp_path: Path) -> None:
    result = compare("wine", seeds=2, epochs=3, jobs=1, out=tmp_path, progress=False)
    assert result.task == "wine"
    assert len(result.all_runs) == 2 * 2 * 3
    assert result.report.exists()


def test_learning_rates_runs(tmp_path: Path) -> None:
    path = EXAMPLES / "learning_rates.py"
    result = compare(path, seeds=2, epochs=1, optimizers=["adamw-0.001"], jobs=1, out=tmp_path, progress=False)
    assert result.task == "learning-rates"
    assert len(result.all_runs) == 2 * 3


def test_flax_digits_runs_and_is_judged(tmp_path: Path) -> None:
    pytest.importorskip("flax", reason="needs flax: run `make jax`")
    path = EXAMPLES / "flax_digits.py"
    result = compare(path, seeds=1, jobs=1, out=tmp_path, progress=False)
    assert result.task == "flax_digits"
    losses, metrics = ({run.final(name) for run in result.all_runs} for name in ("train_loss", "test_metric"))
    assert len(losses) == 3, "each arm trains differently"
    assert min(metric or 0 for metric in metrics) > 0.8
