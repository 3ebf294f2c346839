"""The report, its figures and the summary."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gradcentral
from gradcentral.experiment import Comparison, Task
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.report import write_report

compare = functools.partial(compare_loudly, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    def run(seed: int, arm: str) -> Iterator[dict[str, float]]:
        gain = {"none": 0.0, "gradient": 0.02, "update": 0.0}[arm] * (1 + 0.1 * seed)
        for epoch in (1, 2, 3):
            loss = float("inf") if (arm, seed, epoch) == ("update", 2, 3) else 2.0**-epoch
            yield {"train_loss": loss, "test_metric": 0.3 * epoch + gain + 0.001 * seed, "train_metric": 0.95}

    return compare(run, seeds=5, jobs=1, out=tmp_path_factory.mktemp("report"))


def test_the_report_is_self_contained(finished: Comparison) -> None:
    html = finished.report.read_text()
    resources = re.findall(r'(?:src|href|srcset)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import', html)
    assert len(resources) == 6  # three figures, each in light and in dark
    assert all(found[0].startswith("data:image/svg+xml;base64,") for found in resources)
    assert "<script" not in html
    assert not re.search(r"https?://", html)
    assert str(finished.out) not in html


def test_the_report_of_a_custom_task_claims_no_checks(finished: Comparison) -> None:
    assert "was not checked" in finished.report.read_text()


def test_the_verdict_precedes_figures_tables_and_command(finished: Comparison) -> None:
    html = finished.report.read_text()
    places = [
        html.index(text)
        for text in (
            "better: accuracy".replace("accuracy", "metric").capitalize(),
            "<figure>",
            "<table>",
            "gradcentral.compare(task, seeds=5)",
        )
    ]
    assert places == sorted(places)


def test_diverged_runs_are_listed(finished: Comparison) -> None:
    html = finished.report.read_text()
    assert "1 of 5 runs diverged (without GC: 0)" in html
    assert "custom, update, seed 2 (epoch 3)" in html
    assert "<td>1 of 5</td>" in html


def test_the_summary_has_one_row_per_arm(finished: Comparison) -> None:
    rows = list(csv.DictReader((finished.out / "summary.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["none", "gradient", "update"]
    assert [row["diverged"] for row in rows] == ["0", "0", "1"]
    assert float(rows[0]["test_metric_mean"]) == pytest.approx(0.902)
    assert float(rows[0]["gap_mean"]) == pytest.approx(0.95 - 0.902)
    assert float(rows[1]["difference"]) == pytest.approx(0.024)
    assert float(rows[1]["low"]) < 0.024 < float(rows[1]["high"])
    assert rows[1]["outcome"] == "better"
    assert rows[0]["difference"] == rows[0]["outcome"] == ""


@pytest.mark.parametrize("name", ["differences", "test_metric", "training_loss"])
def test_figures_are_not_blank(finished: Comparison, name: str) -> None:
    from matplotlib import image

    pixels = image.imread(finished.out / f"{name}.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.02


def test_a_report_of_one_seed_is_inconclusive(tiny: Callable[..., Task], tmp_path: Path) -> None:
    result = compare(tiny(), seeds=1, epochs=1, arms=["none", "regularized"], jobs=1, out=tmp_path)
    html = result.report.read_text()
    assert "use more seeds" in html
    assert "<td>regularized</td>" in html


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    from gradcentral.experiment import CustomTask

    task = CustomTask("x", lambda seed, arm: [{"train_loss": 1, "test_metric": 1}], metric_name="<b>&")
    html = compare(task, seeds=1, jobs=1, out=tmp_path).report.read_text()
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "gradcentral.compare('digits', seeds=1, epochs=1, optimizers=['sgd'])"),
        (
            {"arms": ["none", "update"], "seeds": [3]},
            "gradcentral.compare('digits', seeds=[3], epochs=1, arms=['none', 'update'], optimizers=['sgd'])",
        ),
    ],
)
def test_the_command_repeats_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], command: str
) -> None:
    chosen = {"seeds": 1, "epochs": 1, "optimizers": ["sgd"], "jobs": 1, "out": tmp_path / "runs" / "digits"} | options
    result = compare("digits", **chosen)  # type: ignore[arg-type]
    assert result.command == command
    monkeypatch.chdir(tmp_path)
    repeated = eval(result.command.replace(")", ", progress=False)"), {"gradcentral": gradcentral})
    assert repeated.all_runs == result.all_runs
    assert repeated.probe == result.probe


def test_a_checked_report_shows_where_gc_acts_and_its_effects(tiny: Callable[..., Task], tmp_path: Path) -> None:
    result = compare(tiny(), seeds=2, epochs=3, jobs=1, out=tmp_path)
    html = result.report.read_text()
    assert result.probe is not None
    assert f"GC removes {result.probe.share:.1%} of the whole gradient" in html
    for name in ("gradient_norm", "drift", "share"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert all(title in html for title in ("Gradient norm", "Drift of the weights", "Where GC acts"))


def test_a_report_of_runs_without_gradient_norms_leaves_the_figure_out(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    result = compare(tiny(), seeds=1, epochs=1, jobs=1, out=tmp_path)
    for run in result.all_runs:
        for name in ("gradient_norm", "centered_norm", "drift"):
            del run.epochs[0][name]
    write_report(result)
    assert "Gradient norm" not in result.report.read_text()


def test_the_report_is_written_if_all_runs_diverge_in_the_first_epoch(
    tiny: Callable[..., Task], tmp_path: Path
) -> None:
    task = tiny(optimizers={"sgd": lambda p: torch.optim.SGD(p, lr=1e30)})
    result = compare(task, seeds=2, jobs=1, out=tmp_path)
    assert all(run.diverged_at == 1 for run in result.all_runs)
    html = result.report.read_text()
    assert "2 of 2 runs diverged (without GC: 2), no pair finished" in html
    assert html.count("<td>2 of 2</td>") == 3
    assert "Training loss</h2>" not in html  # there is nothing to draw
    assert compare(task, seeds=2, jobs=1, out=tmp_path).report.read_text()


def test_the_report_is_written_if_the_metric_is_never_finite(tiny: Callable[..., Task], tmp_path: Path) -> None:
    result = compare(tiny(metric=lambda output, target: float("nan")), seeds=2, jobs=1, out=tmp_path)
    html = result.report.read_text()
    assert "is not finite in 2 of 2 pairs, no pair can be compared" in html
    assert "is not finite in 6 runs: sgd, none, seed 0; " in html
    assert html.count("<td>0 of 2</td>") == 3
    assert "Training loss</h2>" in html
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["test_metric_mean"] for row in rows] == ["", "", ""]


def test_the_report_notes_seeds_with_equal_initial_weights(tiny: Callable[..., Task], tmp_path: Path) -> None:
    weights = tiny().model().state_dict()

    def pretrained() -> torch.nn.Module:
        model = tiny().model()
        model.load_state_dict(weights)
        return model

    html = compare(tiny(model=pretrained), seeds=2, jobs=1, out=tmp_path).report.read_text()
    assert "All 2 seeds start from the same weights" in html
