"""Monitor with sharded parameters: the same records on all ranks as in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradcentral
from gradcentral.diagnostics.record import Record
from tests.distributed.workers import Workers


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()


def _train(model: nn.Module, placement: str, steps: int, **arguments: Any) -> tuple[list[Record], dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    monitor = gradcentral.Monitor(model, optimizer, every=2, **arguments)
    gradcentral.centralize(optimizer, model, placement)
    x = torch.arange(24, dtype=torch.float64).reshape(4, 6) / 24
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    monitor.remove()
    return monitor.records, monitor.state_dict()["start"]


def record(how: str, placement: str, folder: str) -> tuple[list[Record], list[Record], bool]:
    """Return the records of a sharded and of a whole training, and whether their references are the same."""
    whole = _model()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "FSDP2":
        fully_shard(sharded, mesh=mesh)
    else:
        parallelize_module(sharded, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert isinstance(next(sharded.parameters()), DTensor)
    to = Path(folder, "run.jsonl") if dist.get_rank() == 0 else None
    found, references = _train(sharded, placement, 5, to=to)
    expected, expected_references = _train(whole, placement, 5)
    same = all(torch.allclose(references[name], value) for name, value in expected_references.items())
    return found, expected, same


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("how", ["FSDP2", "tensor parallelism"])
def test_records_of_sharded_parameters_are_those_of_one_process(
    how: str, placement: str, two_ranks: Workers, tmp_path: Path
) -> None:
    results = two_ranks.run(record, how, placement, str(tmp_path))
    for found, expected, same_references in results:
        assert same_references
        assert [one.step for one in found] == [0, 2, 4]
        for one, other in zip(found, expected, strict=True):
            assert one.placement == placement
            assert one.scalars() == pytest.approx(other.scalars(), rel=1e-9, abs=1e-13)
    assert results[0][0] == results[1][0]
    read = gradcentral.Monitor.read(tmp_path / "run.jsonl")
    assert [one.net.norm for one in read] == pytest.approx([one.net.norm for one in results[0][0]], rel=1e-5)


def record_where_a_rank_has_no_gradient() -> tuple[float | None, float | None, float | None]:
    """Return norms for a gradient that only the first rank has, one that no rank has, and the whole net."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    layers: Any = model
    for layer in layers:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gradcentral.Monitor(model, optimizer)
    if dist.get_rank() == 0:
        layers[0].weight.grad = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)])
    monitor._before_step(optimizer, (optimizer,), {})
    (found,) = monitor.records
    return found.layers["0.weight"].norm, found.layers["1.weight"].norm, found.net.norm


def test_a_rank_without_a_gradient_does_not_wait_forever(two_ranks: Workers) -> None:
    for first, second, net in two_ranks.run(record_where_a_rank_has_no_gradient):
        assert first == net == pytest.approx(12**0.5)
        assert second is None


def write_to_one_file(folder: str) -> str:
    """Train a model on each rank, with a monitor for the same file on all ranks; return the error."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gradcentral.Monitor(model, optimizer, to=Path(folder, "run.jsonl"))
    message = ""
    for rank in range(dist.get_world_size()):  # one after another
        if rank == dist.get_rank():
            try:
                _step(model, optimizer)
            except ValueError as error:
                message = str(error)
        dist.barrier()
    monitor.remove()
    dist.barrier()
    # The remedy: one rank writes.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradcentral.Monitor(model, optimizer, to=Path(folder, "again.jsonl") if dist.get_rank() == 0 else None):
        _step(model, optimizer)
    return message


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    output: Tensor = model(torch.ones(3))
    torch.autograd.backward(output.sum())
    optimizer.step()


def test_ranks_cannot_write_to_one_file(two_ranks: Workers, tmp_path: Path) -> None:
    first, second = two_ranks.run(write_to_one_file, str(tmp_path))
    assert first == ""
    assert "run.jsonl receives the records of a Monitor in another process" in second
    assert "with several ranks, pass to= in one of them only" in second
    assert len(gradcentral.Monitor.read(tmp_path / "run.jsonl")) == 1
    assert len(gradcentral.Monitor.read(tmp_path / "again.jsonl")) == 1


def probe_sharded() -> str:
    """Return the error of probing a sharded model; before sharding, it works."""
    model = _model()
    batch = torch.ones(4, 6, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    assert gradcentral.probe(model, nn.functional.mse_loss, [batch]).centered
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        gradcentral.probe(model, nn.functional.mse_loss, [batch])
    except ValueError as error:
        return str(error)
    return ""


def test_a_sharded_model_is_not_probed(two_ranks: Workers) -> None:
    for message in two_ranks.run(probe_sharded):
        assert message == "model: 0.weight is sharded (a DTensor); probe the model before sharding it"
