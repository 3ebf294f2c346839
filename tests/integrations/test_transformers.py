"""The callback for Hugging Face's Trainer: training equals a loop by hand that clips first and centers second."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: run `make trainers`")
pytest.importorskip("accelerate", reason="needs accelerate: run `make trainers`")

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import gradcentral
from gradcentral.diagnostics.record import Record
from gradcentral.integrations.transformers import GradientCentralization
from tests.distributed.workers import Workers
from tests.integrations import hugging_face_ranks as ranks
from tests.integrations.hand_written import difference
from tests.integrations.hugging_face import build, center_by_hand, drift, means, train_by_hand, trainer
from tests.integrations.pages import run_page

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    """Return a process group of two ranks."""
    workers = Workers(2)
    yield workers
    workers.stop()


class Observer(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps what the Trainer trains with."""

    def on_train_begin(self, *_: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        """Keep model and optimizer, and what is attached to it."""
        self.model, self.optimizer, self.attached = model, optimizer, gradcentral.attached(optimizer)


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ({}, {}),
        ({"max_grad_norm": 0.2, "gradient_accumulation_steps": 2}, {"clip": 0.2, "accumulate": 2}),
        ({"bf16": True}, {"autocast": True}),
        ({"activation_checkpointing": True}, {}),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}),
    ],
)
def test_training_equals_a_loop_by_hand(tmp_path: Path, arguments: dict[str, Any], by_hand: dict[str, Any]) -> None:
    model = build()
    trainer(tmp_path, model, GradientCentralization(), **arguments).train()
    expected = train_by_hand(build(), steps=4, **by_hand)
    uncentered = train_by_hand(build(), steps=4, center=None, **by_hand)
    assert difference(model, expected) < 1e-7
    assert difference(expected, uncentered) > 1e-4


def test_the_trainer_clips_before_gradients_are_centered(tmp_path: Path) -> None:
    model = build()
    trainer(tmp_path, model, GradientCentralization(), max_grad_norm=0.2).train()
    assert difference(model, train_by_hand(build(), steps=4, clip=0.2)) < 1e-7
    assert difference(model, train_by_hand(build(), steps=4, clip=0.2, clip_last=True)) > 1e-4


def test_strength_scales_what_is_subtracted(tmp_path: Path) -> None:
    model = build()
    trainer(tmp_path, model, GradientCentralization(strength=0.5)).train()
    expected = train_by_hand(build(), steps=4, center=partial(center_by_hand, strength=0.5))
    assert difference(model, expected) < 1e-7


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "rmsprop"])
def test_placement_update_keeps_the_means_with_any_optimizer(tmp_path: Path, optim: str) -> None:
    """Weight decay included, which the Trainer applies to one of its two groups."""
    model = build()
    before = means(model)
    callback = GradientCentralization("update", exclude=["*.mlp.*"])
    trainer(tmp_path, model, callback, optim=optim, learning_rate=1e-2, weight_decay=0.1).train()
    moved = drift(model, before)
    assert max(value for name, value in moved.items() if "attn" in name) < 1e-8
    assert min(value for name, value in moved.items() if "mlp" in name) > 1e-5  # excluded


def test_a_second_training_attaches_again(tmp_path: Path) -> None:
    model, callback, observer = build(), GradientCentralization(), Observer()
    trained = trainer(tmp_path, model, callback, observer)
    trained.train()
    assert len(observer.attached) == 1
    assert gradcentral.attached(observer.optimizer) == []
    assert callback.handle is None
    trained.train()
    assert len(observer.attached) == 1
    expected = train_by_hand(train_by_hand(build(), steps=4), steps=4)
    assert difference(model, expected) < 1e-7


def test_training_again_after_an_exception(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    model, callback, observer = build(), GradientCentralization(monitor=1), Observer()
    trained = trainer(tmp_path, model, callback, observer, Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    trained.remove_callback(Interrupt)
    trained.train()
    assert callback.monitor is not None
    assert [record.step for record in callback.monitor.records] == [0, 1, 2, 3]
    assert difference(model, train_by_hand(train_by_hand(build(), steps=2), steps=4)) < 1e-7


def test_each_model_of_model_init_is_centered(tmp_path: Path) -> None:
    observer = Observer()
    trained = trainer(tmp_path, lambda: build(), GradientCentralization(), observer)
    first = trained.train() and observer.model
    second = trained.train() and observer.model
    expected = train_by_hand(build(), steps=4)
    assert first is not second
    assert max(difference(first, expected), difference(second, expected)) < 1e-7


def test_what_the_user_has_attached_stays(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = gradcentral.centralize(optimizer, model)
    trainer(tmp_path, model, GradientCentralization(), init={"optimizers": (optimizer, None)}).train()
    assert gradcentral.attached(optimizer) == [handle]
    assert difference(model, train_by_hand(build(), steps=4)) < 1e-7


@pytest.mark.parametrize("exclude", [[], ["*.mlp.*"]])
def test_gradcentrals_optimizers_keep_the_groups_of_the_trainer(tmp_path: Path, exclude: list[str]) -> None:
    """The Trainer passes them groups of parameters, with and without weight decay, and no model."""
    observer, models = Observer(), [build(), build()]
    arguments: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.0}
    layout = {"layout": gradcentral.weight_layout(models[0], exclude=exclude)} if exclude else {}
    choice = (gradcentral.SGD, {"lr": 0.1, "placement": "update", **layout})
    before = means(models[0])
    trainer(tmp_path, models[0], observer, init={"optimizer_cls_and_kwargs": choice}, **arguments).train()
    optimizer = observer.optimizer.optimizer
    assert isinstance(optimizer, gradcentral.SGD)
    groups = [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(0.1, 6), (0.0, 10)]
    assert max(value for name, value in drift(models[0], before).items() if "attn" in name) < 1e-8
    trainer(tmp_path, models[1], GradientCentralization("update", exclude=exclude), **arguments).train()
    assert difference(*models) < 1e-7


def test_placement_none_records_an_optimizer_of_gradcentral_and_one_without_gc(tmp_path: Path) -> None:
    def train(callback: GradientCentralization, optimizer: torch.optim.Optimizer) -> None:
        trainer(tmp_path, model, callback, init={"optimizers": (optimizer, None)}).train()

    for placement, create in (("update", gradcentral.SGD), (None, torch.optim.SGD)):
        model, callback = build(), GradientCentralization(None, exclude=["*.mlp.*"], monitor=2)
        options: dict[str, Any] = {"placement": placement} if placement else {}
        train(callback, create(model.parameters(), lr=0.1, **options))
        assert callback.monitor is not None
        records = callback.monitor.records
        assert [(record.step, record.placement) for record in records] == [(0, placement), (2, placement)]
        assert callback.handle is None
        layers = ("attn.c_attn", "attn.c_proj")
        assert [*records[0].layers] == [f"transformer.h.0.{name}.weight" for name in layers]
    model = build()
    own = gradcentral.SGD(model, lr=0.1)
    with pytest.raises(ValueError, match=r"gradcentral.SGD already centers: .*placement=None, monitor=100"):
        train(GradientCentralization("update"), own)
    train(GradientCentralization(placement=None, monitor=100), own)


@pytest.mark.filterwarnings("ignore:.*already one.*")
def test_two_callbacks_for_different_layers(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}

    def train(checkpoint: Path | None, *monitors: int | None) -> tuple[Any, list[Record]]:
        model = build()
        half = GradientCentralization(strength=0.5, exclude=["*.mlp.*"], monitor=monitors[0])
        update = GradientCentralization("update", exclude=["*.attn.*"], monitor=monitors[1])
        trained = trainer(tmp_path / "run", model, half, update, **arguments)
        trained.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        assert update.monitor is not None
        return model, update.monitor.records

    before = means(build())
    whole, records = train(None, None, 1)
    moved = drift(whole, before)
    assert max(value for name, value in moved.items() if "mlp" in name) < 1e-8
    assert min(value for name, value in moved.items() if "attn" in name) > 1e-5
    resumed, later = train(tmp_path / "run" / "checkpoint-4", None, 1)
    assert difference(whole, resumed) == 0
    assert later == records[4:]
    with pytest.raises(ValueError, match="monitor: another GradientCentralization of this Trainer has one too"):
        train(None, 1, 1)


class Reporter(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A logger for ``report_to``."""

    received: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the logs."""
        self.received.append((state.global_step, dict(logs)))


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name under which ``report_to`` finds `Reporter`."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "reporter", Reporter)
    monkeypatch.setattr(Reporter, "received", [])
    return "reporter"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of TensorBoard
def test_records_reach_all_loggers_of_the_trainer(
    tmp_path: Path, reporter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = GradientCentralization(monitor=2)
    trained = trainer(
        tmp_path, build(), callback, report_to=["tensorboard", reporter], logging_strategy="steps", logging_steps=1
    )
    trained.train()
    assert callback.monitor is not None
    expected = [(record.step, record.scalars()) for record in callback.monitor.records]
    assert [step for step, _ in expected] == [0, 2]
    assert [entry for entry in Reporter.received if "gc/share" in entry[1]] == expected
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for tag in ("gc/share", "gc_share/transformer.h.0.attn.c_attn.weight"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{tag}")]
        assert written == [(step, pytest.approx(scalars[tag])) for step, scalars in expected]
    assert "train/loss" in events.Tags()["scalars"]
    assert "gc/share" not in capsys.readouterr().out
    assert not any("gc/share" in entry for entry in trained.state.log_history)


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_training_is_bit_identical_and_so_are_the_monitors_records(tmp_path: Path, restore: bool) -> None:
    arguments: dict[str, Any] = {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }

    def train(folder: str, checkpoint: Path | None = None) -> tuple[Any, list[Record]]:
        callback: Any = GradientCentralization(strength=0.9, monitor=2)
        model = build(resid_pdrop=0.1)
        trained = trainer(tmp_path / folder, model, callback, **arguments)
        trained.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        callback = next(each for each in trained.callback_handler.callbacks if isinstance(each, type(callback)))
        assert repr(callback) == "GradientCentralization(placement='gradient', strength=0.9, monitor=2)"
        return model, callback.monitor.records

    whole, records = train("whole")
    resumed, later = train("resumed", tmp_path / "whole" / "checkpoint-3")
    assert difference(whole, resumed) == 0
    assert records[2].step == 4
    assert later == records[2:]
    assert (records[2].net.drift or 0) > 1e-3  # since the beginning of the training


def test_a_checkpoint_from_before_the_callback_was_added_can_be_resumed(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, build(), **arguments).train()
    model, callback = build(), GradientCentralization(monitor=1)
    trained = trainer(tmp_path, model, callback, **arguments)
    trained.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    half = train_by_hand(build(), steps=3, center=None)
    assert difference(model, train_by_hand(half, steps=3, skip=3)) < 1e-7
    assert callback.monitor is not None
    assert [record.step for record in callback.monitor.records] == [3, 4, 5]


def test_settings_are_checked_when_the_callback_is_created() -> None:
    with pytest.raises(ValueError, match="unknown placement 'weights'; choose from 'gradient'"):
        GradientCentralization("weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength"):
        GradientCentralization(strength=2)
    with pytest.raises(ValueError, match="unknown only='linear'; choose from 'all', 'conv'"):
        GradientCentralization(only="linear")  # type: ignore[arg-type]
    for monitor in (0, True, 1.5):
        with pytest.raises(ValueError, match="monitor must be the number of steps per record, such as monitor=100"):
            GradientCentralization(monitor=monitor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="placement=None attaches nothing: give monitor=100"):
        GradientCentralization(None)
    with pytest.raises(TypeError, match="overrides and exclude must consist of text"):
        GradientCentralization(exclude=[torch.nn.Linear(2, 2)])  # type: ignore[list-item]
    assert repr(GradientCentralization(strength=0)) == "GradientCentralization(placement='gradient', strength=0.0)"
    callback = GradientCentralization("update", overrides={"head.weight": "[i] o"}, exclude="*.wte.*", monitor=5)
    saved = json.loads(json.dumps(callback.state()))
    assert GradientCentralization(**saved["args"]).state() == callback.state()


def test_the_example_of_the_documentation() -> None:
    results = doctest.testmod(importlib.import_module(GradientCentralization.__module__))
    assert (results.failed, results.attempted) == (0, 1)


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("transformers")
    records = page["callback"].monitor.records
    assert [record.step for record in records] == [0, 2, 4, 6]
    assert records[-1].net.drift < 1e-6


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_equal_a_loop_by_hand_on_the_whole_batch(tmp_path: Path, two_ranks: Workers, kind: str) -> None:
    for centered, uncentered in two_ranks.run(ranks.train_with_trainer, kind, str(tmp_path), limit_s=240):
        assert centered < 1e-7
        assert uncentered > 1e-4


def test_fsdp1_is_refused(tmp_path: Path, two_ranks: Workers) -> None:
    for message in two_ranks.run(ranks.error_of_fsdp1, str(tmp_path), limit_s=240):
        assert "wrapped in FullyShardedDataParallel (FSDP1)" in message
        assert message.endswith("with accelerate, set fsdp_version: 2")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: run `make trainers`")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_works_in_stage_0_and_is_refused_with_a_remedy_in_others(tmp_path: Path, stage: int) -> None:
    """DeepSpeed clips in its own step: before the callback centers, and after `centralize_in_backward` has centered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.integrations.deepspeed_trainer", str(port), str(stage), str(tmp_path)]
    # DeepSpeed prints to stdout too.
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.partition("difference: ")[2].split()[0]) < 1e-7
    remedy = "call gradcentral.centralize_in_backward(model) before trainer.train() instead"
    assert (remedy in run.stdout) == (stage > 0)
