"""The callback for Lightning: parameters equal those of loops with GC written by hand."""

from __future__ import annotations

import doctest
import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import gradcentral
from tests.integrations import hand_written
from tests.integrations.hand_written import adamw, batches, difference, network, sgd
from tests.integrations.lightning_runs import PACKAGES, QUIET, fit, loader, module
from tests.integrations.pages import run_page

lightning: Any = pytest.importorskip("lightning.pytorch", reason="needs lightning: run `make trainers`")

from gradcentral.integrations.lightning import GradientCentralization  # noqa: E402

pytestmark = QUIET
ROUNDING = 1e-6
"""Largest difference of two float32 trainings that compute the same; without GC it is at least 1000 times as large."""


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("placement", ["gradient", "regularized", "update"])
def test_training_equals_a_loop_written_by_hand(package: str, placement: Any) -> None:
    model = module(package=package)
    fit(model, GradientCentralization(placement), package=package)
    by_hand = hand_written.train(network(), batches(), sgd, placement, weight_decay=0.01)
    assert difference(model.net, by_hand) < ROUNDING
    without = hand_written.train(network(), batches(), sgd, None)
    assert difference(model.net, without) > 1000 * ROUNDING


def test_lightning_clips_first_and_centers_second() -> None:
    model = module()
    fit(model, GradientCentralization(), gradient_clip_val=0.05, accumulate_grad_batches=2)
    options: dict[str, Any] = {"accumulate": 2, "clip": 0.05}
    by_hand = hand_written.train(network(), batches(), sgd, **options)
    assert difference(model.net, by_hand) < ROUNDING
    other_order = hand_written.train(network(), batches(), sgd, **options, clip_first=False)
    assert difference(model.net, other_order) > 100 * ROUNDING


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_bf16_mixed_precision(placement: Any) -> None:
    model = module(adamw)
    fit(model, GradientCentralization(placement), precision="bf16-mixed")

    def loss(net: nn.Module, batch: hand_written.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(net(batch[0]), batch[1])

    by_hand = hand_written.train(network(), batches(), adamw, placement, loss=loss)
    assert difference(model.net, by_hand) < ROUNDING


def test_bf16_true_precision() -> None:
    model = module()
    fit(model, GradientCentralization("update"), precision="bf16-true")
    start = [p.bfloat16() for p in network().parameters()]
    for p, before in zip(model.net.parameters(), start, strict=True):
        if p.ndim > 1:
            moved = (p.detach() - before).float().flatten(1)
            # The weights have eight significant bits, so their means are exact to a part of their rounding.
            assert moved.mean(1).abs().max() < 0.02 * moved.abs().max()


def test_strength_only_and_exclude_reach_centralize() -> None:
    callback = GradientCentralization(strength=0.5, only="conv")
    fit(module(), callback)
    assert callback.handle is not None
    assert callback.handle.strength == 0.5
    assert [callback.handle.layout.names[p] for p in callback.handle.layout] == ["net.0.weight"]
    excluding = GradientCentralization(exclude=["net.3.*"], overrides={"net.0.weight": "[o] i k k"})
    fit(module(), excluding)
    assert excluding.handle is not None
    assert [str(vectors.pattern) for vectors in excluding.handle.layout.values()] == ["[o] i k k"]


def test_a_resumed_run_is_bit_identical_and_its_monitor_continues(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[Any, Any, Any]:
        model, callback = module(adamw), GradientCentralization("update", monitor=3)
        return model, callback, fit(model, callback, max_epochs=epochs, ckpt_path=ckpt_path)

    _, first, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed, second, _ = run(2, tmp_path / "first.ckpt")
    whole, both, _ = run(2)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    assert [record.step for record in first.monitors[0].records] == [0, 3, 6]
    assert [record.step for record in second.monitors[0].records] == [9, 12, 15]
    assert first.monitors[0].records + second.monitors[0].records == both.monitors[0].records
    assert both.monitors[0].records[-1].net.drift < 1e-5


def test_a_monitor_that_starts_in_a_resumed_run_counts_all_steps(tmp_path: Path) -> None:
    trainer = fit(module(), GradientCentralization())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = GradientCentralization(monitor=4)
    fit(module(), callback, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert [record.step for record in callback.monitors[0].records] == [8, 12]


def test_records_reach_all_loggers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found,import-untyped,unused-ignore]

    csv = lightning.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    board = lightning.loggers.TensorBoardLogger(tmp_path)
    callback: Any = GradientCentralization(monitor=4)
    fit(module(), callback, logger=[csv, board])
    first, second = callback.monitors[0].records
    assert first.placement == "gradient"
    assert first.net.share > 0.1
    lines = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [int(row["step"]) for row in rows] == [0, 4]
    assert [float(row["gc/share"]) for row in rows] == pytest.approx([first.net.share, second.net.share])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    scalars = events.Scalars("gc_share/net.0.weight")
    assert [event.step for event in scalars] == [0, 4]
    assert scalars[1].value == pytest.approx(second.layers["net.0.weight"].share)


def test_a_fast_development_run_has_no_loggers() -> None:
    callback = GradientCentralization(monitor=1)
    fit(module(), callback, fast_dev_run=True, logger=True)
    assert len(callback.monitors[0].records) == 1


def test_it_detaches_and_attaches_again_in_the_next_fit() -> None:
    model, callback = module(), GradientCentralization(monitor=8)
    trainer = fit(model, callback)
    (optimizer,) = trainer.optimizers
    assert gradcentral.attached(optimizer) == []
    assert "removed" in repr(callback.handle)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert [record.step for record in callback.monitors[0].records] == [8]
    by_hand = hand_written.train(network(), batches(), sgd)
    # The second fit creates another optimizer, so its momentum starts at zero.
    assert difference(model.net, hand_written.train(by_hand, batches(), sgd)) < ROUNDING


@pytest.mark.parametrize("state", ["active", "paused", "removed"])
def test_optimizers_that_are_replaced_while_training_are_centered_as_the_handle_says(state: str) -> None:
    class Replace(lightning.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                assert callback.handle is not None
                callback.handle.strength = 0.5
                if state == "paused":
                    callback.handle.pause()
                if state == "removed":
                    callback.handle.remove()
                trainer.strategy.setup_optimizers(trainer)

    def center_half(optimizer: Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1):
            p.grad -= 0.5 * p.grad.mean(tuple(range(1, p.ndim)), keepdim=True)

    def half(parameters: Any) -> Optimizer:
        optimizer = sgd(parameters)
        optimizer.register_step_pre_hook(center_half)
        return optimizer

    model, callback = module(), GradientCentralization(monitor=4)
    trainer = fit(model, callback, Replace(), max_epochs=2)
    by_hand = hand_written.train(network(), batches(), sgd)
    hand_written.train(by_hand, batches(), half if state == "active" else sgd, None)
    assert difference(model.net, by_hand) < ROUNDING
    if state != "removed":
        assert [record.step for record in callback.monitors[0].records] == [8, 12]
        assert (callback.monitors[0].records[0].net.drift or 0) > 1e-3  # since the beginning of the training
    assert gradcentral.attached(trainer.optimizers[0]) == []


def test_it_detaches_if_training_raises() -> None:
    class Stop(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            optimizers.extend(trainer.optimizers)
            raise RuntimeError("stopped")

    optimizers: list[Optimizer] = []
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module(), GradientCentralization(), Stop())
    assert gradcentral.attached(optimizers[0]) == []


def test_what_configure_optimizers_has_attached_stays_attached() -> None:
    model, handles = module(), []

    def configure_optimizers() -> Optimizer:
        optimizer = sgd(model.parameters())
        handles.append(gradcentral.centralize(optimizer, model))
        return optimizer

    model.configure_optimizers = configure_optimizers
    callback = GradientCentralization()
    trainer = fit(model, callback)
    assert callback.handle is handles[0]
    assert gradcentral.attached(trainer.optimizers[0]) == handles
    by_hand = hand_written.train(network(), batches(), sgd)
    assert difference(model.net, by_hand) < ROUNDING


def test_centering_before_clipping() -> None:
    model = module()
    model.on_before_optimizer_step = lambda optimizer: gradcentral.centralize_gradients(model)
    fit(model, gradient_clip_val=0.05)
    by_hand = hand_written.train(network(), batches(), sgd, clip=0.05, clip_first=False)
    assert difference(model.net, by_hand) < ROUNDING


def test_a_search_for_the_learning_rate_runs_without_callbacks_but_with_what_was_attached_before(
    tmp_path: Path,
) -> None:
    def search(attach: bool) -> set[int]:
        model, counts = module(), set()
        model.lr = 0.01

        def configure_optimizers() -> Optimizer:
            optimizer = torch.optim.SGD(model.parameters(), lr=model.lr)
            if attach:
                gradcentral.centralize(optimizer, model)
            optimizer.register_step_post_hook(lambda *_: counts.add(len(gradcentral.attached(optimizer))))
            return optimizer

        model.configure_optimizers = configure_optimizers
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}
        trainer = lightning.Trainer(callbacks=[GradientCentralization()], default_root_dir=tmp_path, **options)
        lightning.tuner.Tuner(trainer).lr_find(model, loader(), num_training=4)
        return counts

    assert search(attach=False) == {0}
    assert search(attach=True) == {1}


def test_one_package_is_enough_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = importlib.import_module(GradientCentralization.__module__).__file__
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    one = runpy.run_path(str(adapter))["GradientCentralization"]
    fit(model := module(), one())
    assert difference(model.net, hand_written.train(network(), batches(), sgd)) < ROUNDING
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ModuleNotFoundError, match="Lightning is not installed: pip install lightning"):
        runpy.run_path(str(adapter))


def test_the_example_of_the_documentation() -> None:
    results = doctest.testmod(importlib.import_module(GradientCentralization.__module__))
    assert (results.failed, results.attempted) == (0, 1)


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("lightning")
    assert page["drift"] < ROUNDING
    assert [record.step for record in page["callback"].monitors[0].records] == [0, 4, 8, 12]
    assert page["callback"].monitors[0].records[-1].net.share > 0.1
    assert "gc/share" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
