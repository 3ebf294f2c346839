"""Loops with accelerate: attached before or after ``prepare``, and gradcentral's own optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="needs accelerate: run `make trainers`")
pytest.importorskip("transformers", reason="needs transformers: run `make trainers`")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

import gradcentral
from tests.distributed.workers import Workers
from tests.integrations import hugging_face_ranks as ranks
from tests.integrations.hand_written import difference
from tests.integrations.hugging_face import build, data, drift, means, train_by_hand
from tests.integrations.pages import run_page


@pytest.fixture(autouse=True)
def _new_state() -> Iterator[None]:
    """Forget the settings of the last Accelerator, which accelerate shares in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    """Return a process group of two ranks."""
    workers = Workers(2)
    yield workers
    workers.stop()


def loader() -> Any:
    return DataLoader([block["input_ids"] for block in data()], batch_size=4)  # type: ignore[arg-type]


def train(
    accelerator: Any, model: Any, optimizer: Any, batches: Any, clip: float | None = None, gradients: bool = False
) -> None:
    """Train for one epoch, with accumulation."""
    for tokens in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            if accelerator.sync_gradients:
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                if gradients:
                    gradcentral.centralize_gradients(model)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("how", ["before", "after", "SGD", "gradients"])
def test_accumulation_and_clipping_equal_a_loop_by_hand(how: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = build()
    optimizer: Any = gradcentral.SGD(net, lr=0.1) if how == "SGD" else torch.optim.SGD(net.parameters(), lr=0.1)
    if how == "before":
        gradcentral.centralize(optimizer, net)
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    if how == "after":
        gradcentral.centralize(optimizer, model)
    train(accelerator, model, optimizer, batches, clip=0.2, gradients=how == "gradients")
    by_hand: dict[str, Any] = {"steps": 4, "accumulate": 2, "clip": 0.2}
    assert difference(net, train_by_hand(build(), **by_hand)) < 1e-7
    assert difference(net, train_by_hand(build(), center=None, **by_hand)) > 1e-4


def test_mixed_precision_and_a_closure() -> None:
    """accelerate passes LBFGS's closure on, and computes the gradients of float32 weights in bfloat16."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net = build()
    before = means(net)
    model, optimizer = accelerator.prepare(net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3))
    gradcentral.centralize(optimizer, model)
    tokens = next(iter(loader()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert max(drift(net, before).values()) < 1e-7
    assert difference(net, build()) > 1e-3


def test_a_saved_state_continues_bit_identically_with_its_monitor(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net = build()
    model, optimizer, batches = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2), loader())
    gradcentral.centralize(optimizer, model, "update")
    logged: list[int] = []
    monitor = gradcentral.Monitor(model, optimizer, every=4, to=lambda record: logged.append(record.step))
    accelerator.register_for_checkpointing(monitor)
    before = means(net)
    train(accelerator, model, optimizer, batches)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, batches)
    first, records = [p.detach().clone() for p in net.parameters()], monitor.records
    accelerator.load_state(str(tmp_path))
    assert monitor.step == 8
    train(accelerator, model, optimizer, batches)
    assert all(map(torch.equal, first, net.parameters()))
    assert monitor.records == records
    assert logged == [0, 4, 8, 12, 8, 12]
    assert max(drift(net, before).values()) < 1e-7


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of TensorBoard
def test_records_reach_the_trackers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    net = build()
    model, optimizer, batches = accelerator.prepare(net, gradcentral.SGD(net, lr=0.1), loader())
    monitor = gradcentral.Monitor(model, optimizer, every=4, to=accelerator)
    train(accelerator, model, optimizer, batches)
    accelerator.end_training()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("gc/share")]
    assert written == [(record.step, pytest.approx(record.net.share)) for record in monitor.records]
    assert [step for step, _ in written] == [0, 4]


@pytest.mark.parametrize(
    ("kind", "how"),
    [("DDP", "before"), ("DDP", "SGD"), *(("FSDP2", how) for how in ("before", "after", "SGD", "gradients"))],
)
def test_two_processes_equal_a_loop_by_hand_on_the_whole_batch(two_ranks: Workers, kind: str, how: str) -> None:
    """``prepare`` gives an optimizer the sharded parameters in place of those that it was created with."""
    for centered, uncentered in two_ranks.run(ranks.train_with_accelerate, kind, how, limit_s=240):
        assert centered < 1e-7
        assert uncentered > 1e-4


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("accelerate")
    assert page["monitor"].records[-1].net.drift < 1e-6
