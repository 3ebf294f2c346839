"""benchmarks/evidence.py: which runs, the search for learning rates, the statistics, and the page's numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402
import evidence_analysis as analysis  # noqa: E402
import evidence_page as page  # noqa: E402
import evidence_runs as runs  # noqa: E402

from gradcentral.experiment.tasks import SUITE  # noqa: E402
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS  # noqa: E402

RATES = {"lr": 0.1, "weight_decay": 0.0}


def record(task: str, optimizer: str, arm: str, seed: int, metric: float, **changes: Any) -> dict[str, Any]:
    """Return the record of a run, with accuracy as the metric."""
    fields = {
        "task": task,
        "optimizer": optimizer,
        "arm": arm,
        "factor": 1.0,
        "seed": seed,
        **RATES,
        "metric": "accuracy",
        "higher_is_better": True,
        "diverged_at": None,
        "train_loss": [1.0, 0.5],
        "test_metric": [0.1, metric],
        "share": 0.2,
        "drift": 1.0,
        "dead": 0.1,
        "data": "",
        "seconds": 1.0,
        "machine": "a computer",
    }
    return fields | changes


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Return runs of a whole grid in which "update" halves the error of one task and nothing else has an effect."""
    random = np.random.default_rng(1)
    found = []
    for cell in runs.grid(SUITE, lambda task, optimizer: RATES, seeds=5, more=5):
        error = 0.2 * (1 + 0.02 * random.normal())
        if (cell.task, cell.arm) == ("fashion-none", "update"):
            error /= 2
        changes = {"factor": cell.factor, "train_loss": [2.0, error, error / 2 if cell.arm == "none" else error / 3]}
        found.append(record(cell.task, cell.optimizer, cell.arm, cell.seed, 1 - error, **changes))
    return found


def test_every_prefix_of_the_grid_is_paired_and_the_best_rate_comes_first() -> None:
    cells = runs.grid(SUITE, lambda task, optimizer: RATES, seeds=5, more=10)
    per_seed = len(SUITE) * (4 + 3 + 3)
    assert len(cells) == len({*cells}) == per_seed * (5 * 3 + 5)
    assert {(cell.factor, cell.seed) for cell in cells[:per_seed]} == {(1.0, 0)}
    assert {cell.factor for cell in cells[: 5 * per_seed]} == {1.0}
    assert {cell.factor for cell in cells[5 * per_seed : 15 * per_seed]} == {0.25, 4.0}
    assert {cell.seed for cell in cells[15 * per_seed :]} == {5, 6, 7, 8, 9}
    assert {cell.optimizer for cell in cells if cell.arm == "regularized"} == {"sgd"}
    assert not {cell.seed for cell in cells} & {*runs.SEARCH_SEEDS, *analysis.FRESH_SEEDS}


def test_the_search_extends_the_range_of_rates_and_then_tries_weight_decays() -> None:
    tried: dict[tuple[float, float], float] = {}

    def score(lr: float, decay: float) -> float:  # best at a rate of 1 and a weight decay of 0.005
        return 1 - 0.1 * abs(math.log10(lr)) - 0.01 * abs(decay - 0.005)

    found: list[dict[str, Any]] = []
    for _ in range(10):
        known = {(entry["lr"], entry["weight_decay"], entry["seed"]) for entry in found}
        wanted = [c for c in runs.trials("lora", "sgd", found) if (c.lr, c.weight_decay, c.seed) not in known]
        if not wanted:
            break
        for cell in wanted:
            assert cell.arm == "none"
            tried[cell.lr, cell.weight_decay] = metric = score(cell.lr, cell.weight_decay)
            rates = {"lr": cell.lr, "weight_decay": cell.weight_decay}
            found.append(record("lora", "sgd", "none", cell.seed, metric, **rates))
    assert not wanted
    assert sorted(lr for lr, decay in tried if decay == 5e-4) == [0.01, 0.03, 0.1, 0.3, 0.9, 3.0]
    assert sorted(decay for lr, decay in tried if lr == 0.9) == [0.0, 5e-4, 5e-3]
    assert runs.best_rates("lora", "sgd", found) == {"lr": 0.9, "weight_decay": 5e-3}
    # A diverged run is worse than any other.
    lost = [entry | {"diverged_at": 1} if entry["lr"] == 0.9 else entry for entry in found]
    assert runs.best_rates("lora", "sgd", lost) == {"lr": 3.0, "weight_decay": 5e-4}


def test_the_effect_is_the_paired_reduction_of_the_error_in_percent() -> None:
    none, other = [0.80, 0.82, 0.84], [0.82, 0.83, 0.87]
    found = [record("lora", "sgd", "none", seed, value) for seed, value in enumerate(none)]
    found += [record("lora", "sgd", "gradient", seed, value) for seed, value in enumerate(other)]
    found.append(record("lora", "sgd", "gradient", 7, 0.9))  # without its pair
    (effect,) = analysis.cells(found)
    differences = 100 * (np.array(other) - none) / (1 - np.mean(none))
    assert effect.pairs == 3
    assert effect.mean == pytest.approx(differences.mean())
    expected = stats.ttest_1samp(differences, 0)
    assert effect.p == effect.p_holm == pytest.approx(expected.pvalue)
    assert effect.interval == pytest.approx(tuple(expected.confidence_interval()))
    # Where less is better, the metric is the error itself.
    lower = [entry | {"higher_is_better": False, "test_metric": [1 - entry["test_metric"][-1]]} for entry in found]
    assert analysis.cells(lower)[0].mean == pytest.approx(effect.mean)
    diverged = [entry | {"diverged_at": 2} if entry["seed"] == 2 else entry for entry in found]
    assert analysis.cells(diverged)[0].pairs == 2


def test_p_values_are_corrected_by_holms_method() -> None:
    effects = [analysis.Effect(str(p), "", "", 5, 1.0, 1.0, (0.0, 1.0), p) for p in (0.04, 0.01, 0.03, 0.005)]
    effects.append(analysis.Effect("unknown", "", "", 1, 1.0, 0.0))
    corrected = {effect.name: effect.p_holm for effect in analysis.holm(effects)}
    assert corrected == pytest.approx({"0.005": 0.02, "0.01": 0.03, "0.03": 0.06, "0.04": 0.06, "unknown": None})


def test_the_random_effects_summary_agrees_with_a_published_example() -> None:
    # Equal standard errors: the mean is the average, and Hartung and Knapp's error that of the average.
    means = [10.0, 20.0, 30.0, 40.0]
    effects = [analysis.Effect("lora", "sgd", "update", 5, mean, 1.0) for mean in means]
    summary = analysis.pooled("kind", "update", effects)
    assert summary is not None
    assert summary.mean == pytest.approx(25)
    assert summary.error == pytest.approx(np.std(means, ddof=1) / 2)
    assert summary.interval == pytest.approx(tuple(stats.t.interval(0.95, 3, 25, summary.error)))
    # Without a spread between cells, the error is the usual one.
    same = analysis.pooled("kind", "update", [effect._replace(mean=25.0) for effect in effects])
    assert same is not None
    assert same.error == pytest.approx(0.5)
    assert analysis.pooled("kind", "update", effects[:1]) is None


def test_an_effect_in_one_kind_of_model_is_found_and_none_in_the_others(records: list[dict[str, Any]]) -> None:
    significant = [(e.name, e.optimizer, e.arm) for e in analysis.cells(records) if e.significant]
    assert significant == [("fashion-none", name, "update") for name in ("sgd", "adamw", "lion")]
    helped = [e for e in analysis.kinds(analysis.cells(records)) if e.significant]
    assert [(e.name, e.arm, e.verdict) for e in helped] == [("CNN without normalization", "update", "helps")]
    assert helped[0].mean == pytest.approx(50, abs=2)
    repeated = analysis.strongest(records)
    assert {cell.task for cell in repeated} == {"fashion-none"}
    assert {cell.seed for cell in repeated} == {*analysis.FRESH_SEEDS}
    assert len(repeated) == 3 * 2 * 10


def test_the_correlation_with_the_share_resamples_tasks() -> None:
    names = list(SUITE)
    effects = [analysis.Effect(name, "sgd", "update", 5, float(i), 1.0) for i, name in enumerate(names)]
    shares = {name: i / 20 for i, name in enumerate(names)}
    found = analysis.share_correlation(effects, shares, "update", lambda effect: effect.mean)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert (found.cells, found.tasks) == (12, 12)
    mixed = [effect._replace(mean=float((i * 5) % 12)) for i, effect in enumerate(effects)]
    wide = analysis.share_correlation(mixed, shares, "update", lambda effect: effect.mean)
    assert wide is not None
    assert wide.low < wide.value < wide.high
    assert wide.high - wide.low > 0.5


def test_speed_counts_the_epochs_to_the_final_loss_of_the_baseline(records: list[dict[str, Any]]) -> None:
    for speed in analysis.speeds(records):
        assert speed.runs == len(OPTIMIZERS) * 5 * sum(kind == speed.kind for kind in analysis.KINDS.values())
        # The final loss of an arm is 2/3 of the baseline's, up to noise; with half the error it is reached in epoch 2.
        early = (speed.kind, speed.arm) == ("CNN without normalization", "update")
        assert speed.fraction == pytest.approx(2 / 3 if early else 1, abs=0.34 if early else 0.01)


@pytest.fixture
def results(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    probes = [{"task": task, "shares": [0.1 * (i + 1), 0.1 * (i + 1)]} for i, task in enumerate(SUITE[:9])]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    fresh = [
        record(
            cell.task, cell.optimizer, cell.arm, cell.seed, (0.8 if cell.arm == "none" else 0.9) + 1e-3 * (i * i % 7)
        )
        for i, cell in enumerate(analysis.strongest(records))
    ]
    (tmp_path / "confirmation.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in fresh))
    return tmp_path


def test_the_page_is_filled_with_tables_and_figures(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    monkeypatch.setattr(page, "ADVICE", tmp_path / "evidence.json")
    assert len(page.write_page(results)) == 4
    advice = json.loads((tmp_path / "evidence.json").read_text())
    found = [effect["cells"] for effect in advice["CNN without normalization"]]
    assert found == ["no clear effect in 3", "better in 3 of 3"]
    text = copy.read_text(encoding="utf-8")
    assert re.search(
        r"\| CNN without normalization \| 10% \| .* \| \*\*\+5\d .*no clear effect in 3 \| better in 3 of 3 \|", text
    )
    assert len(re.findall(r"\| `fashion-none` \| SGD \| `update` \|.* \*\*\+\d\d \[.* \| 10 \| yes \|", text)) == 1
    first = text
    page.write_page(results)
    assert copy.read_text(encoding="utf-8") == first


def test_the_numbers_on_the_page_are_those_of_the_raw_runs() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.parts(evidence.RESULTS)) == text
    effects = analysis.cells(runs.read_records(evidence.RESULTS / evidence.RUNS))
    assert json.loads(page.ADVICE.read_text()) == page.summaries(effects)


def test_the_advice_of_the_page_agrees_with_the_runs() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    effects = analysis.cells(runs.read_records(evidence.RESULTS / evidence.RUNS))
    clear = {effect.name for effect in effects if effect.significant}
    assert "The significant improvements are all here" in text  # in convolutional networks
    convolutional = {task for task, kind in analysis.KINDS.items() if "CNN" in kind or "convolutional" in kind}
    assert {effect.name for effect in effects if effect.verdict == "helps"} <= convolutional
    assert "Our small fine-tuning tasks show no\n  clear effect" in text
    assert not clear & {"fine-tuning", "lora"}
    assert "Transformers, GRUs, small networks for tables**: we found no significant effect" in text
    assert not {task for task in clear if task.startswith(("text", "tabular"))}
    assert "without normalization improved with Lion too" in " ".join(text.split())
    helped = {(effect.name, effect.optimizer) for effect in effects if effect.verdict == "helps"}
    assert {("fashion-none", "lion"), ("autoencoder", "lion")} <= helped
    assert "at a quarter of that rate no run diverges" in text
    diverging = {(e.name, e.optimizer) for e in effects if e.verdict == "diverges more often"}
    slower = analysis.cells(runs.read_records(evidence.RESULTS / evidence.RUNS), (0.25,))
    assert {(e.name, e.optimizer): e.diverged for e in slower}.items() >= dict.fromkeys(diverging, 0).items()


def test_recorded_runs_of_one_seed_trained_on_the_same_batches() -> None:
    batches: dict[tuple[str, int], set[str]] = {}
    for name in (evidence.RUNS, evidence.CONFIRMED):
        for entry in runs.read_records(evidence.RESULTS / name):
            batches.setdefault((entry["task"], entry["seed"]), set()).add(entry["data"])
    assert len(batches) >= 5 * len(SUITE)
    assert all(len(hashes) == 1 for hashes in batches.values())


def test_a_page_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has the parts kinds; generated are kinds, cells"):
        page.filled("<!-- kinds -->\n<!-- end -->\n", {"kinds": "", "cells": ""})


def test_the_rates_of_the_package_are_those_of_the_recorded_search() -> None:
    from gradcentral.experiment.tasks import optimizers

    chosen = json.loads((evidence.RESULTS / evidence.RATES).read_text())
    records = runs.read_records(evidence.RESULTS / evidence.SEARCH)
    for task in SUITE:
        assert optimizers.tuned(task) == chosen[task]
        for name, rates in chosen[task].items():
            assert rates == runs.best_rates(task, name, records), (task, name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run"], "run needs --out DIR"),
        (["run", "--out", "x", "--tasks", "mnist"], "--tasks: unknown mnist; choose from fashion-none"),
        (["run", "--out", "x", "--device", "cuda"], "--device and --epochs are for --scale paper"),
    ],
)
def test_an_unusable_option_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.main(given)
    assert message in capsys.readouterr().err
