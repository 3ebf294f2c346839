"""The examples run."""

from __future__ import annotations

from pathlib import Path

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
