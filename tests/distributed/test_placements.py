"""Steps on sharded parameters equal steps on whole ones, for every layout and every DTensor placement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

import gradcentral
from gradcentral import WeightLayout, WeightVectors, kernels, weight_layout
from gradcentral.distributed import shards_of
from gradcentral.local_shard import cuts_of, indices_of_shards
from gradcentral.optim.base import CentralizedOptimizer
from gradcentral.targets import PLACEMENTS
from tests.distributed.workers import Workers

LAYOUTS: dict[str, tuple[tuple[int, ...], WeightVectors]] = {
    "rows": ((6, 10), WeightVectors((1,))),
    "columns": ((10, 6), WeightVectors((0,))),
    "convolution": ((5, 3, 3, 3), WeightVectors((1, 2, 3))),
    "depthwise": ((6, 1, 3, 3), WeightVectors((1, 2, 3))),
    "experts": ((4, 6, 5), WeightVectors((1,))),
    "one row": ((1, 7), WeightVectors((1,))),
    "one vector": ((3, 5), WeightVectors((0, 1))),
    "grouped transposed convolution": ((8, 3, 2, 2), WeightVectors((1, 3, 4), view=(2, 4, 3, 2, 2))),
    "phases": ((4, 3, 4, 4), WeightVectors((0, 2, 4), view=(4, 3, 2, 2, 2, 2))),
    "groups that shards cut": ((6, 5), WeightVectors((1,), view=(3, 2, 5))),
    "slow factor of an axis": ((8, 3), WeightVectors((0,), view=(4, 2, 3))),
    "fast factor of an axis": ((5, 12), WeightVectors((2,), view=(5, 4, 3))),
    "middle factor of an axis": ((16, 3), WeightVectors((1,), view=(2, 4, 2, 3))),
    "joined axes": ((4, 3, 5), WeightVectors((0,), view=(12, 5))),
}

# The shape of a mesh, and the parameter's DTensor placement per mesh dimension.
MESHES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows on 2": ((2,), (Shard(0),)),
    "columns on 2": ((2,), (Shard(1),)),
    "replicas on 2": ((2,), (Replicate(),)),
    "rows on 4": ((4,), (Shard(0),)),
    "columns on 4": ((4,), (Shard(1),)),
    "replicas of rows": ((2, 2), (Replicate(), Shard(0))),
    "replicas of columns": ((2, 2), (Shard(1), Replicate())),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "rows and rows": ((2, 2), (Shard(0), Shard(0))),
    "columns and columns": ((2, 2), (Shard(1), Shard(1))),
    "rows strided": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "columns strided": ((2, 2), (_StridedShard(1, split_factor=2), Shard(1))),
}


class Weights(nn.Module):
    """One parameter of each layout."""

    def __init__(self, placed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(1)
        tensors = {name: torch.randn(*shape, generator=numbers) for name, (shape, _) in LAYOUTS.items()}
        self.weights = nn.ParameterDict({name: nn.Parameter(placed(tensor)) for name, tensor in tensors.items()})

    def layout(self) -> WeightLayout:
        """Return the layout of all parameters."""
        overrides: dict[Any, Any] = {f"weights.{name}": vectors for name, (_, vectors) in LAYOUTS.items()}
        return weight_layout(self, overrides=overrides)


Kind = Callable[[Weights, str], Optimizer]


def _sgd(model: Weights, placement: str) -> Optimizer:
    # Plain SGD: torch's arithmetic on DTensors is slow and not under test.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    gradcentral.centralize(optimizer, layout=model.layout(), placement=placement, strength=0.5)
    return optimizer


def _fused_sgd(model: Weights, placement: str) -> Optimizer:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    return gradcentral.SGD(model.parameters(), **options, layout=model.layout(), placement=placement)


def _fused_adamw(model: Weights, placement: str) -> Optimizer:
    gc: dict[str, Any] = {"layout": model.layout(), "placement": placement, "strength": 0.25}
    return gradcentral.AdamW(model.parameters(), lr=0.1, **gc)


def _reference_sgd(model: Weights, placement: str) -> Optimizer:
    layout = model.layout()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "fused": False}
    return gradcentral.SGD(model.parameters(), **options, layout=layout, placement=placement)


KINDS: tuple[Kind, ...] = (_sgd, _fused_sgd, _fused_adamw, _reference_sgd)


class Outcome(NamedTuple):
    """The comparison of a sharded parameter with the whole one, on one rank."""

    kind: str
    name: str
    split: bool
    equal: bool
    difference: float
    change: float


def _gradients(step: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(*shape, generator=numbers) + 0.5 for name, (shape, _) in LAYOUTS.items()}


def _train(model: Weights, optimizer: Optimizer, placed: Callable[[Tensor], Tensor]) -> None:
    for step in range(5):
        for name, gradient in _gradients(step).items():
            model.weights[name].grad = placed(gradient)
        optimizer.step()


def compare_sharded_with_whole(mesh_name: str, placement: str) -> list[Outcome]:
    """Train sharded and whole parameters with the same gradients."""
    mesh_shape, placements = MESHES[mesh_name]
    mesh = init_device_mesh("cpu", mesh_shape)

    def placed(tensor: Tensor) -> Any:
        return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)

    outcomes = []
    for kind in KINDS:
        whole, sharded = Weights(torch.clone), Weights(placed)
        _train(whole, kind(whole, placement), torch.clone)
        optimizer = kind(sharded, placement)
        _train(sharded, optimizer, placed)
        layout = sharded.layout()
        split = {split.parameter for split in shards_of([*layout.items()], layout.names).split}
        start = Weights(torch.clone)
        # The rounding of torch's steps depends on an element's position in memory: compare the gradients they receive.
        ours = isinstance(optimizer, CentralizedOptimizer)
        for name, expected in whole.weights.items():
            parameter: Any = sharded.weights[name]
            parts = [placed(tensor.detach()).to_local() for tensor in (expected, start.weights[name])]
            got = parameter.detach().to_local()
            differences = [float((got - part).abs().max()) if got.numel() else 0.0 for part in parts]
            gradient = placed(expected.grad).to_local()
            equal = torch.equal(got, parts[0]) if ours else torch.equal(parameter.grad.to_local(), gradient)
            outcomes.append(Outcome(kind.__name__, name, parameter in split, equal, *differences))
    return outcomes


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("ranks", "mesh"), [(math.prod(shape), mesh) for mesh, (shape, _) in MESHES.items()], indirect=["ranks"]
)
def test_sharded_steps_equal_whole_ones(ranks: Workers, mesh: str, placement: str) -> None:
    if mesh == "rows strided" and torch.__version__ < "2.9":
        pytest.skip("in torch 2.8, distribute_tensor cuts 6 rows into 2, 2, 2, 0 instead of FSDP2's 2, 1, 2, 1")
    outcomes_by_rank = ranks.run(compare_sharded_with_whole, mesh, placement)
    for kind, name in itertools.product(KINDS, LAYOUTS):
        own = [o for outcomes in outcomes_by_rank for o in outcomes if (o.kind, o.name) == (kind.__name__, name)]
        assert len(own) == ranks.ranks
        assert max(outcome.change for outcome in own) > 0.01
    for outcomes in outcomes_by_rank:
        assert not [outcome for outcome in outcomes if not outcome.difference <= 1e-6]
        # The rounding of torch's sums (reference path, joined axes) depends on the shape of the tensor.
        here = [outcome for outcome in outcomes if not outcome.split and outcome.name != "joined axes"]
        native = [
            outcome for outcome in here if outcome.kind != "_reference_sgd" and not kernels.native.unavailable_reason()
        ]
        if placement == "regularized":  # two means are added, and the kernel for columns rounds each of them
            native = [outcome for outcome in native if outcome.kind != "_sgd"]
        assert not [outcome for outcome in native if not outcome.equal]


def rows_of_fsdp2_and_tensor_parallelism(rows: int) -> tuple[list[float], list[int]]:
    """Return the rows that this rank holds, read from numbered weights, and those that gradcentral computes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model: Any = nn.Sequential(nn.Linear(1, rows, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(rows).unsqueeze(1))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    weight = model[0].weight
    computed, _ = indices_of_shards(weight, 0, cuts_of(weight, "0.weight")[0])
    return weight.to_local().flatten().tolist(), computed.tolist()


@pytest.mark.parametrize("rows", [5, 6, 8])
def test_the_rows_of_fsdp2_and_tensor_parallelism(four_ranks: Workers, rows: int) -> None:
    answers = four_ranks.run(rows_of_fsdp2_and_tensor_parallelism, rows)
    assert all(held == computed for held, computed in answers)
    assert sorted(row for held, _ in answers for row in held) == [*range(rows)]
