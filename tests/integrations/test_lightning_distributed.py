"""The callback for Lightning on two processes: DDP and ModelParallelStrategy (FSDP2) equal one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tests.distributed.workers import Workers
from tests.integrations import hand_written
from tests.integrations.hand_written import adamw, batches, difference, network, sgd
from tests.integrations.lightning_runs import fit, module
from tests.torchvision_operators import declare_operators

declare_operators()  # this module is also imported by the processes, where no conftest.py runs
lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning: run `make trainers`")

from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402

from gradcentral.integrations.lightning import GradientCentralization  # noqa: E402

OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


class Sharded(type(module())):  # type: ignore[misc]
    """A classifier that ModelParallelStrategy shards."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def _fit(kind: str, optimizer: str, placement: Any, folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Fit on two processes, with four examples per process and step; return module, callback and trainer."""
    os.environ.update(LOCAL_WORLD_SIZE="2", GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    model = (Sharded if kind == "fsdp2" else type(module()))()
    model.configure_optimizers = lambda: OPTIMIZERS[optimizer](model.parameters())
    strategy = DDPStrategy() if kind == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    dataset = TensorDataset(*hand_written.data())
    callback = GradientCentralization(placement, monitor=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(
            model,
            callback,
            batches=DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, shuffle=False)),
            use_distributed_sampler=False,  # Lightning's own sampler shuffles
            devices=2,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],
            logger=lightning.loggers.CSVLogger(folder),
            **options,
        )
    return model, callback, trainer


def _weights(model: Any) -> list[Tensor]:
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in full]


def _train(*case: Any) -> tuple[list[Tensor], list[Any], bool]:
    model, callback, _ = _fit(*case)
    is_sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return _weights(model), callback.monitors[0].records, is_sharded


def _resume(kind: str, folder: Path) -> tuple[list[Tensor], list[Tensor], list[Any], list[Any]]:
    _, _, trainer = _fit(kind, "adamw", "update", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint(folder / "first.ckpt")
    resumed, continued, _ = _fit(kind, "adamw", "update", folder, max_epochs=2, ckpt_path=folder / "first.ckpt")
    whole, both, _ = _fit(kind, "adamw", "update", folder, max_epochs=2)
    return _weights(resumed), _weights(whole), continued.monitors[0].records, both.monitors[0].records


@pytest.mark.parametrize(("optimizer", "placement"), [("sgd", "gradient"), ("sgd", "regularized"), ("adamw", "update")])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind: str, optimizer: str, placement: str, two_ranks: Workers, tmp_path: Path) -> None:
    results = two_ranks.run(_train, kind, optimizer, placement, tmp_path)
    # The sampler deals the examples out in turn, so that a step sees eight consecutive ones, four per process.
    make = OPTIMIZERS[optimizer]
    by_hand = hand_written.train(network(), batches(8), make, placement, weight_decay=0.01)
    without = hand_written.train(network(), batches(8), make, None)
    for weights, _, is_sharded in results:
        assert is_sharded == (kind == "fsdp2")
        trained = network()
        for p, found in zip(trained.parameters(), weights, strict=True):
            nn.utils.vector_to_parameters(found.flatten(), [p])
        assert difference(trained, by_hand) < 1e-5
        assert difference(trained, without) > 1e-3
    assert [(record.step, record.placement) for record in results[0][1]] == [(0, placement), (4, placement)]
    assert all(record.net.share > 0.1 for record in results[0][1])
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert len(lines) == 3  # the names, and two records of one process


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_on_two_processes_resumes_bit_identically(kind: str, two_ranks: Workers, tmp_path: Path) -> None:
    for resumed, whole, continued, both in two_ranks.run(_resume, kind, tmp_path):
        assert all(map(torch.equal, resumed, whole))
        assert [record.step for record in continued] == [8, 12]
        assert continued == both[2:]
