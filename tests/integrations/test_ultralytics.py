"""Ultralytics: training with the callback equals that by a trainer which clips and centers by hand."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradcentral
from tests.integrations.hand_written import center_by_hand, difference, values_of, weights_of
from tests.integrations.pages import run_page

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("ultralytics", reason="needs ultralytics: run `make trainers`")
    pytest.importorskip("polars", reason="Ultralytics needs polars: run `make trainers`")
    YOLO: Any = importlib.import_module("ultralytics").YOLO
    Trainer: Any = importlib.import_module("ultralytics.models.yolo.detect").DetectionTrainer
Image: Any = importlib.import_module("PIL.Image")
logging.getLogger("ultralytics").setLevel(logging.ERROR)

MODEL = """
nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc]]
"""
SETTINGS = {
    "data": "data/data.yaml",
    "epochs": 1,
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "val": False,
    "save": False,
    "verbose": False,
    "amp": False,
    "deterministic": False,
    "optimizer": "SGD",
    "lr0": 0.01,
    "weight_decay": 0.1,
    "warmup_epochs": 0.0,
}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "labels"):
        Path("data", folder).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)).save(f"data/images/{i}.png")
        Path(f"data/labels/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    Path("small.yaml").write_text(MODEL)
    Path("data/data.yaml").write_text(f"path: {tmp_path}/data\ntrain: images\nval: images\nnames: {{0: thing}}\n")


class _ByHand(Trainer):  # type: ignore[misc]
    def optimizer_step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        center_by_hand(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


class _Overridden(Trainer):  # type: ignore[misc]
    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().build_optimizer(*args, **kwargs)
        gradcentral.centralize(optimizer, self.model)
        return optimizer


def _attach(trainer: Any) -> None:
    gradcentral.centralize(trainer.optimizer, trainer.model)


def _train(callback: Callable[[Any], Any] | None = None, trainer: Any = None, **settings: Any) -> Any:
    """Train, and return the trainer."""
    model = YOLO("small.yaml")
    if callback is not None:
        model.add_callback("on_train_start", callback)
    model.train(trainer=trainer, **{**SETTINGS, **settings})
    return model.trainer


def _drift(callback: Callable[[Any], Any] | None = None, **settings: Any) -> float:
    """Train, and return the largest change of a row's mean."""
    start: list[Tensor] = []

    def started(trainer: Any) -> None:
        if callback is not None:
            callback(trainer)
        start.extend(w.detach().clone() for w in weights_of(trainer.model))

    weights = weights_of(_train(started, **settings).model)
    return max(float((w.detach() - w0).flatten(1).mean(1).abs().max()) for w, w0 in zip(weights, start, strict=True))


def _update(trainer: Any) -> None:
    gradcentral.centralize(trainer.optimizer, trainer.model, "update")


def test_training_equals_a_trainer_that_centers_by_hand() -> None:
    expected = values_of(_train(trainer=_ByHand).model)
    assert difference(values_of(_train(_attach).model), expected) < 1e-6
    assert difference(values_of(_train(trainer=_Overridden).model), expected) < 1e-6
    assert difference(values_of(_train().model), expected) > 1e-5


@pytest.mark.parametrize("optimizer", ["SGD", "auto", "MuSGD"])
def test_placement_update_keeps_the_means(optimizer: str) -> None:
    assert _drift(_update, optimizer=optimizer) < 1e-7
    assert _drift(optimizer=optimizer) > 1e-5


def test_a_resumed_run_centers_if_the_callback_is_added_again() -> None:
    class Interrupted(Exception):  # noqa: N818
        pass

    def interrupt(trainer: Any) -> None:
        raise Interrupted

    first = YOLO("small.yaml")
    first.add_callback("on_train_start", _update)
    first.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        first.train(**{**SETTINGS, "epochs": 2, "save": True})
    resumed = YOLO(first.trainer.last)
    start: list[Tensor] = []

    def started(trainer: Any) -> None:
        assert trainer.start_epoch == 1
        assert not gradcentral.attached(trainer.optimizer)
        _update(trainer)
        start.extend(w.detach().clone() for w in weights_of(trainer.model))

    resumed.add_callback("on_train_start", started)
    resumed.train(resume=True)
    changes = [w.detach() - w0 for w, w0 in zip(weights_of(resumed.trainer.model), start, strict=True)]
    assert max(float(change.abs().max()) for change in changes) > 1e-3
    assert max(float(change.flatten(1).mean(1).abs().max()) for change in changes) < 1e-7


def test_the_file_for_the_processes_of_several_gpus_contains_the_callback() -> None:
    trainer = _train(lambda trainer: gradcentral.centralize(trainer.optimizer, trainer.model))
    name = importlib.import_module("ultralytics.utils.dist").generate_ddp_file(trainer)
    written = Path(name).with_suffix(".pt")
    state = importlib.import_module("ultralytics.utils.patches").torch_load(written)
    Path(name).unlink()
    written.unlink()
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters())
    state["callbacks"]["on_train_start"][-1](SimpleNamespace(optimizer=optimizer, model=model))
    assert len(gradcentral.attached(optimizer)) == 1


def test_errors() -> None:
    model = YOLO("small.yaml")
    model.add_callback("on_pretrain_routine_start", _attach)
    with pytest.raises(AttributeError, match="object has no attribute 'optimizer'"):
        model.train(**SETTINGS)
    with pytest.raises(NotImplementedError, match="gradcentral.AdamW"):
        _train(optimizer="gradcentral.AdamW")


def test_page() -> None:
    names = run_page("ultralytics")
    assert max(float(change.flatten(1).mean(1).abs().max()) for change in names["changes"]) < 1e-7
