"""The figures show numbers of real training runs."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcentral.experiment import CustomTask, Task, TaskError, compare, determinism, load_task
from gradcentral.paper.draw import FIGURES, STATEMENTS, draw_all, statement_table
from gradcentral.paper.figures.training import landscape_figure
from gradcentral.paper.study import Study
from tests.experiment.conftest import make_task


def network() -> nn.Module:
    """Return a convolution and linear layers with BatchNorm and dropout, whose state a measurement could change."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study(task: Task, **changes: Any) -> Study:
    fields: dict[str, Any] = {
        "task": task,
        "source": task,
        "optimizer": next(iter(task.optimizers)),
        "seeds": (0, 1),
        "epochs": 2,
    }
    return Study(**fields | changes)


@pytest.fixture(autouse=True)
def like_a_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run comparisons with one thread, bit-identical to a worker's, and without the report, which takes longer."""
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)
    with determinism.one_thread():
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    result = draw_all(make_task(model=network), out=out, seeds=2, epochs=2, progress=False)
    assert result.out == out
    assert list(result.titles) == list(FIGURES)
    return out


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_written_as_an_image_with_its_data(drawn: Path, name: str) -> None:
    from matplotlib import image

    pixels = image.imread(drawn / f"{name}.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] == 1960
    assert pixels[..., :3].std() > 0.02
    assert (drawn / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    assert len(table(drawn / f"{name}.csv")) > 1


def test_the_operation_removes_the_mean_of_each_row(drawn: Path) -> None:
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in table(drawn / "operation.csv"):
        rows.setdefault((cell["layer"], cell["unit_row"]), []).append(
            (float(cell["gradient"]), float(cell["centered"]))
        )
    assert {layer for layer, _ in rows} == {"convolution 1.weight", "linear 6.weight"}
    moved = 0
    for row in rows.values():
        before, after = torch.tensor(row, dtype=torch.float64).T
        torch.testing.assert_close(after, before - before.mean(), rtol=1e-4, atol=1e-8)
        moved += int(before.mean().abs() > 1e-6)
    assert moved > 4


def test_only_the_trajectory_without_gc_leaves_the_hyperplane(drawn: Path) -> None:
    rows = table(drawn / "geometry.csv")
    distance = {
        arm: max(abs(float(row["along_e"])) for row in rows if row["arm"] == arm)
        for arm in ("none", "gradient", "update")
    }
    assert distance["update"] < 1e-6
    assert distance["gradient"] < 1e-3 < distance["none"]  # weight decay moves "gradient" slightly
    assert all(abs(float(row["within_1"])) < 1e-9 for row in rows if row["step"] == "0")


def test_initial_means_cover_every_weight_vector_of_resnet50(drawn: Path) -> None:
    rows = table(drawn / "initial-means.csv")
    for scheme in ("xavier_normal", "kaiming_normal"):
        assert sum(int(row["count"]) for row in rows if row["scheme"] == scheme) == 27_560


def test_a_centered_gradient_is_shorter_than_the_raw_gradient_of_the_same_weights(drawn: Path) -> None:
    first = {(row["place"], row["arm"]): row for row in table(drawn / "gradient-norms.csv") if row["step"] == "0"}
    assert {place for place, _ in first} == {"convolution 1.weight", "linear 6.weight", "whole network"}
    for place, arm in first:
        if arm == "gradient":
            assert float(first[place, arm]["norm_median"]) < float(first[place, "none"]["norm_median"])


def test_learning_curves_equal_those_of_a_comparison(drawn: Path, tmp_path: Path) -> None:
    expected = compare(make_task(model=network), seeds=2, epochs=2, jobs=1, out=tmp_path, progress=False)
    found = {
        (row["arm"], int(row["seed"]), int(row["epoch"])): float(row["train_loss"])
        for row in table(drawn / "learning.csv")
    }
    for run in expected.all_runs:
        for epoch in run.epochs:
            assert found[run.arm, run.seed, epoch["epoch"]] == epoch["train_loss"]


def test_the_statements_hold(drawn: Path) -> None:
    rows = table(drawn / "statements.csv")
    assert {row["source"] for row in rows} >= {"eq. 3", "eq. 4", "section 4.1", "theorem 4.1", "theorem 4.2"}
    assert all(row["holds"] == "True" for row in rows)
    assert all(float(row["value"]) <= float(row["bound"]) for row in rows)


@pytest.mark.parametrize("arm", ["none", "gradient", "update"])
def test_training_equals_that_of_a_comparison(arm: str, tmp_path: Path) -> None:
    task = make_task(model=network)
    losses = [step.loss for step in study(task).train(arm, seed=1)]
    record = compare(task, seeds=[1], epochs=2, jobs=1, out=tmp_path, progress=False).runs("sgd", arm)[0]
    assert len(losses) == study(task).steps == 6
    sizes = [16, 16, 8]
    mean = sum(loss * size for loss, size in zip(losses[3:], sizes, strict=True)) / 40
    assert record.epochs[1]["train_loss"] == pytest.approx(mean, rel=1e-6)


def test_measuring_the_landscape_does_not_disturb_training() -> None:
    task = make_task(model=network)
    plain: list[float] = []
    measured: list[float] = []

    def track(steps: Any, total: int) -> Any:
        for step in steps:
            measured.append(step.loss)
            yield step

    for arm in ("none", "gradient"):
        plain += [step.loss for step in study(task).train(arm, 0)]
    rows = landscape_figure(study(task, track=track)).rows
    assert measured == plain
    assert len(rows) == 2 * 5  # all but the last of six steps, in two arms
    assert all(row[2] <= row[3] and row[4] > 0 and row[5] > 0 for row in rows)


def test_the_landscape_of_a_quadratic_loss_is_exact() -> None:
    """The gradient changes by H·αΔw, and H is constant."""
    task = make_task(
        model=lambda: nn.Linear(6, 1, bias=False).double(),
        train=torch.utils.data.TensorDataset(torch.randn(8, 6).double(), torch.zeros(8, 1).double()),
        batch_size=8,
        optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)},
    )
    x, _ = task.train.tensors
    hessian = 2 * x.T @ x / 8
    runs = study(task, epochs=3)
    weights = [next(step.model.parameters()).detach().clone() for step in runs.train("none", 0)]
    for row, before, after in zip(landscape_figure(runs).rows[:2], weights, weights[1:], strict=False):
        assert row[4] == pytest.approx(float((4 * (after - before) @ hessian).norm()), rel=1e-6)
        assert row[5] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)
        losses = [
            float(((before + reach * (after - before)) @ x.T).square().mean()) for reach in (0, 0.25, 0.5, 1, 2, 4)
        ]
        assert (row[2], row[3]) == pytest.approx((min(losses), max(losses)), rel=1e-6)


def test_the_example_task(tmp_path: Path) -> None:
    drawn = draw_all("wine", out=tmp_path, seeds=1, epochs=1, optimizer="adam", progress=False,
                     only=["gradient-norms", "shares", STATEMENTS])  # fmt: skip
    assert list(drawn.titles) == ["gradient-norms", "shares"]
    assert drawn.titles["shares"] == "wine: where GC acts before training"
    assert all(measured.holds for measured in drawn.statements)
    # Without a convolution, the two largest layers are drawn.
    places = {row["place"] for row in table(tmp_path / "gradient-norms.csv")}
    assert places == {"linear 2.weight", "linear 0.weight", "whole network"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["shapes"]}, "only: unknown figure 'shapes'; choose from operation, geometry"),
        ({"only": "shares"}, "only: give a list of names, such as only=['shares']"),
        ({"optimizer": "lion"}, "optimizer: unknown optimizer 'lion'; choose from sgd"),
        ({"seeds": 0}, "seeds: give an integer"),
        ({"epochs": 0}, "epochs: give an integer"),
        ({"device": "nowhere"}, "device: 'nowhere' is not available; choose from cpu"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        draw_all(make_task(), out=tmp_path, progress=False, **options)
    assert message in str(caught.value)


def test_the_suggested_options_work(tmp_path: Path) -> None:
    message = refused(tmp_path, make_task(), only=["shapes"])
    assert message.partition("choose from ")[2].split(", ") == [*FIGURES, STATEMENTS]  # which `drawn` draws
    message = refused(tmp_path, make_task(), only="shares")
    only = eval(message.partition("only=")[2])
    message = refused(tmp_path, make_task(), optimizer="lion")
    optimizer = message.partition("choose from ")[2]
    drawn = draw_all(make_task(), out=tmp_path, progress=False, only=only, optimizer=optimizer)
    assert list(drawn.titles) == ["shares"]


def test_a_device_without_double_precision_is_refused_and_the_suggested_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcentral.paper.draw.check_device", lambda device, amp: None)
    message = refused(tmp_path, make_task(), device="mps")
    assert "device: 'mps' has no double precision" in message
    suggested = message.partition("; use ")[2]
    assert draw_all(make_task(), out=tmp_path, progress=False, only=["shares"], device=suggested).titles


def test_a_custom_task_is_refused() -> None:
    task: Any = CustomTask("mine", lambda seed, arm: [])
    with pytest.raises(TaskError, match="is a CustomTask, whose training steps are not accessible; give a Task"):
        draw_all(task)


def test_built_in_digits_have_a_convolution_and_a_linear_layer() -> None:
    task = load_task("digits")
    assert isinstance(task, Task)
    assert [entry.name for entry in study(task).example_layers] == ["4.weight", "7.weight"]


def only_transposed() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 1, 2), nn.Tanh(), nn.Flatten())


def test_statements_about_layers_that_the_network_lacks_are_reported(tmp_path: Path) -> None:
    from rich.console import Console

    drawn = draw_all(make_task(model=only_transposed), out=tmp_path, seeds=1, epochs=1, progress=False,
                     only=["geometry", STATEMENTS])  # fmt: skip
    assert list(drawn.titles) == ["geometry"]
    assert all(measured.holds for measured in drawn.statements)
    assert [skipped.source for skipped in drawn.statements.skipped] == ["theorem 4.1", "section 4.1"]
    rows = {row["statement"]: row for row in table(tmp_path / "statements.csv")}
    assert len(rows) > 8
    for skipped in drawn.statements.skipped:
        assert rows[skipped.statement]["where"] == f"skipped: {skipped.reason}"
        assert rows[skipped.statement]["holds"] == rows[skipped.statement]["value"] == ""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(statement_table(drawn.statements))
    assert "skipped: model: no centered Linear or convolution" in capture.get()


def test_a_network_with_sparse_gradients_can_be_drawn(tmp_path: Path) -> None:
    def embedded() -> nn.Module:
        return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))

    ids = torch.randint(0, 10, (20, 3), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(ids, torch.randn(20, 2))
    task = make_task(model=embedded, train=data, test=data, optimizers={"sgd": lambda p: torch.optim.SGD(p, lr=0.1)})
    drawn = draw_all(task, out=tmp_path, seeds=1, progress=False, only=["landscape", "gradient-norms", STATEMENTS])
    assert all(measured.holds for measured in drawn.statements)
    assert len(table(tmp_path / "landscape.csv")) == 2 * 3


def test_examples_may_be_mappings(tmp_path: Path) -> None:
    class Named(nn.Linear):
        def forward(self, *, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    data: Any = [{"x": torch.rand(6), "y": torch.randn(2)} for _ in range(20)]
    named = make_task(model=lambda: Named(6, 2), train=data, test=data,
                      loss=lambda output, batch: nn.functional.mse_loss(output, batch["y"]),
                      metric=lambda output, batch: (output - batch["y"]).abs().mean())  # fmt: skip
    only = ["geometry", "landscape", STATEMENTS]
    drawn = draw_all(named, out=tmp_path, seeds=1, epochs=2, progress=False, only=only)
    assert list(drawn.titles) == only[:2]
    assert all(measured.holds for measured in drawn.statements)


def refused(tmp_path: Path, task: Task, **options: Any) -> str:
    """Return the message of the error, which must be raised before anything is written."""
    with pytest.raises(TaskError) as caught:
        draw_all(task, out=tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_network_without_weight_vectors_is_refused_with_the_reason(tmp_path: Path) -> None:
    message = refused(tmp_path, make_task(model=lambda: nn.Sequential(nn.LayerNorm(6), nn.AdaptiveAvgPool1d(2))))
    assert "task 'tiny': no trainable parameter is centered" in message
    assert "norm" in message


def test_a_single_step_is_refused_if_a_figure_needs_more_and_the_suggested_epochs_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcentral.paper.study.Figure.write", lambda figure, folder, name: None)
    whole = make_task(batch_size=40, epochs=1)
    message = refused(tmp_path, whole)
    assert message.startswith("epochs: a run is a single step, and geometry, gradient-norms, learning, landscape")
    drawn = draw_all(whole, out=tmp_path, progress=False, only=["operation", "shares"])
    assert list(drawn.titles) == ["operation", "shares"]
    both = draw_all(whole, out=tmp_path, progress=False, only=["geometry", "landscape", STATEMENTS],
                    epochs=int(message.partition("set epochs to ")[2]))  # fmt: skip
    assert list(both.titles) == ["geometry", "landscape"]


def test_errors_of_the_statements_are_task_errors(tmp_path: Path) -> None:
    def old() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))

    with pytest.raises(TaskError, match=r"statements: model: 0\.weight .*parametrizations\.weight_norm"):
        draw_all(make_task(model=old), out=tmp_path, progress=False, only=[STATEMENTS])


def test_without_second_derivatives_the_landscape_is_refused_and_the_suggested_figures_work(tmp_path: Path) -> None:
    ids = torch.randint(0, 10, (40, 3))
    data = torch.utils.data.TensorDataset(ids, torch.randn(40, 2))
    bag = make_task(model=lambda: nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2)), train=data, test=data)
    with pytest.raises(TaskError, match="landscape: torch cannot compute this .*embedding_bag") as caught:
        draw_all(bag, out=tmp_path, progress=False, only=["landscape", "shares"])
    suggested = str(caught.value).partition("choose only ")[2].split(", ")
    assert list(draw_all(bag, out=tmp_path, progress=False, only=suggested).titles) == ["shares"]


def test_a_study_uses_its_device() -> None:
    there = study(make_task(), device="meta")
    assert all(p.is_meta for p in there.fresh_model().parameters())
    assert all(part.is_meta for batch in there.batches(0) for part in batch)


def test_every_figure_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def track(bars: Any, iterable: Any, total: int, *, description: str) -> Any:
        taken = 0
        for item in iterable:
            yield item
            taken += 1
        assert taken == total
        names.append(description)

    shown: list[bool] = []
    monkeypatch.setattr("gradcentral.paper.study.Figure.write", lambda figure, folder, name: None)

    def without_progress(task: Task, **options: Any) -> Any:
        shown.append(options.pop("progress"))
        return compare(task, **options, progress=False, jobs=1)

    monkeypatch.setattr("rich.progress.Progress.track", track)
    monkeypatch.setattr("gradcentral.paper.figures.training.compare", without_progress)
    draw_all(make_task(), out=tmp_path, seeds=1, epochs=1)
    assert set(names) == {*FIGURES, STATEMENTS} - {"learning"}
    assert shown == [True]


def test_a_terminal_shows_a_bar_and_everything_else_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradcentral.paper.study.Figure.write", lambda figure, folder, name: None)
    draw_all(make_task(), out=tmp_path, only=["operation"])
    assert capsys.readouterr().out == "operation: done\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    draw_all(make_task(), out=tmp_path, only=["operation"])
    out = capsys.readouterr().out
    assert "100%" in out
    assert "operation: done\n" in out
