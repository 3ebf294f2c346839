"""`centered_update` and `center_update_` on sharded weights equal the same calls on whole ones."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradcentral
from gradcentral import center, center_update_, centered_update, weight_layout
from tests.distributed.sharding import shard_and_average
from tests.distributed.test_placements import LAYOUTS, MESHES, Weights
from tests.distributed.workers import Workers


def _changes() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(5)
    return {name: torch.randn(*shape, generator=numbers) + 0.5 for name, (shape, _) in LAYOUTS.items()}


def differences_from_whole(mesh_name: str, strength: float) -> dict[str, tuple[float, float]]:
    """Change sharded weights, with the model and as two states; return the distances from old + Φ(change)."""
    mesh_shape, placements = MESHES[mesh_name]
    mesh = init_device_mesh("cpu", mesh_shape)

    def placed(tensor: Tensor) -> Any:
        return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)

    whole, sharded = Weights(torch.clone), Weights(placed)
    layout, changes = sharded.layout(), _changes()
    old = copy.deepcopy(sharded.state_dict())
    old["weights.rows"] = old["weights.rows"].redistribute(mesh, [Replicate()] * mesh.ndim)
    new = {f"weights.{name}": old[f"weights.{name}"] + placed(change) for name, change in changes.items()}
    new["weights.rows"] = new["weights.rows"].redistribute(mesh, placements)
    with centered_update(sharded, layout, strength), torch.no_grad():
        for name, change in changes.items():
            sharded.weights[name].add_(placed(change))
    center_update_(new, old, layout, strength)
    found = {}
    for name, change in changes.items():
        key = f"weights.{name}"
        expected = placed(whole.weights[name].detach() + center(change, layout[key], strength)).to_local()
        results = [sharded.weights[name].detach(), new[key]]
        distances = [(result.to_local() - expected).abs() for result in results]
        found[name] = tuple(float(distance.max()) if distance.numel() else 0.0 for distance in distances)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [(2, mesh) for mesh, (shape, _) in MESHES.items() if math.prod(shape) == 2] + [(4, "rows and columns")],
    indirect=["ranks"],
)
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_sharded_changes_equal_whole_ones(ranks: Workers, mesh: str, strength: float) -> None:
    for differences in ranks.run(differences_from_whole, mesh, strength):
        assert set(differences) == set(LAYOUTS)
        assert max(itertools.chain.from_iterable(differences.values())) < 2e-6


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train_sharded(kind: str) -> dict[str, float]:
    """Train with plain AdamW inside blocks; return the largest difference from placement "update" on one device."""
    model: Any = _model()
    expected = _model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "FSDP2":
        shard_and_average(model, mesh, reshard_after_forward=False)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    single = gradcentral.AdamW(expected, lr=0.05, weight_decay=0.1, placement="update")
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(4):
        with centered_update(model):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        single.zero_grad()
        expected(batch).square().mean().backward()
        single.step()
    with centered_update(model):
        model(batch)  # without a backward pass, FSDP2 leaves the gathered parameters in the model
    if kind == "FSDP2":
        model.reshard()
    pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
    return {name: float((_full(p) - other.detach()).abs().max()) for (name, p), other in pairs}


@pytest.mark.parametrize("kind", ["FSDP2", "tensor parallelism"])
def test_training_a_sharded_model_inside_blocks(two_ranks: Workers, kind: str) -> None:
    for differences in two_ranks.run(train_sharded, kind):
        assert set(differences) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert max(differences.values()) < 1e-5


def refuse_mixed_states() -> str:
    """Pass a state that is sharded and one that is not; return the message."""
    model: Any = _model()
    old = copy.deepcopy(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(ValueError, match="DTensor") as raised:
        center_update_(model.state_dict(), old, weight_layout(model))
    return str(raised.value)


def test_a_sharded_and_a_plain_state_are_refused(two_ranks: Workers) -> None:
    problem = "0.weight is a DTensor in new, but a plain tensor in old"
    expected = f"{problem}: convert one of them with distribute_tensor or full_tensor"
    assert set(two_ranks.run(refuse_mixed_states)) == {expected}
