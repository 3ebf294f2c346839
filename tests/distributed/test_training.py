"""Training on several ranks gives the same parameters as training on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import gradcentral
from gradcentral import distributed, kernels
from tests.distributed.sharding import shard_and_average
from tests.distributed.workers import Workers

STEPS, BATCH = 20, 16


class Net(nn.Module):
    """A convolution, a grouped transposed convolution and linear layers of odd sizes, so that shards are uneven."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.conv = nn.Conv2d(1, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm = nn.LayerNorm(100)
        self.wide = nn.Linear(100, 12)
        self.narrow = nn.Linear(12, 7)
        self.head = nn.Linear(7, 3)

    def _body(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(F.gelu(self.conv(x))))
        return F.gelu(self.narrow(F.gelu(self.wide(self.norm(x.flatten(1))))))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, 1, 6, 6]`` to ``[n, 3]``."""
        hidden = checkpoint(self._body, x, use_reentrant=False) if self.checkpointed else self._body(x)
        output: Tensor = self.head(hidden)
        return output


class Recipe(NamedTuple):
    """The settings of a training run."""

    kind: str
    placement: str = "gradient"
    micro_batches: int = 1
    clip: str = "no"
    checkpointed: bool = False
    same_batch: bool = False


OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 1e-3, "weight_decay": 0.01},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
}


KINDS = ("torch.SGD", "torch.AdamW", "gradcentral.SGD", "gradcentral.Adam", "gradcentral.AdamW")


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    where, name = recipe.kind.split(".")
    make = getattr(gradcentral if where == "gradcentral" else torch.optim, name)
    if where == "gradcentral":
        return make(model, **OPTIONS[name], placement=recipe.placement)  # type: ignore[no-any-return]
    optimizer: Optimizer = make(model.parameters(), **OPTIONS[name])
    if recipe.clip != "after":
        gradcentral.centralize(optimizer, model, recipe.placement)
    return optimizer


def _zero(recipe: Recipe, model: nn.Module) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns

    where, name = recipe.kind.split(".")
    if where == "gradcentral":
        options = {**OPTIONS[name], "model": model, "placement": recipe.placement}
        return ZeroRedundancyOptimizer(model.parameters(), getattr(gradcentral, name), **options)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), getattr(torch.optim, name), **OPTIONS[name])
    gradcentral.centralize(optimizer, model, recipe.placement)
    return optimizer


class Scaled(NamedTuple):
    """A model on several ranks, and the part of each batch that this rank receives."""

    model: nn.Module
    part: int = 0
    parts: int = 1
    make_optimizer: Callable[[Recipe, nn.Module], Optimizer] = _optimizer


def _ddp(net: Net) -> Scaled:
    return Scaled(DistributedDataParallel(net), dist.get_rank(), dist.get_world_size())


def _ddp_zero(net: Net) -> Scaled:
    return Scaled(DistributedDataParallel(net), dist.get_rank(), dist.get_world_size(), _zero)


def _shard_layers(net: Net, mesh: Any) -> None:
    shard_and_average([net.conv, net.up], mesh)
    shard_and_average(net, mesh)


def _fsdp2(net: Net) -> Scaled:
    _shard_layers(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Scaled(net, dist.get_rank(), dist.get_world_size())


def _hsdp(net: Net) -> Scaled:
    _shard_layers(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return Scaled(net, dist.get_rank(), dist.get_world_size())


def _split_layers(net: Net, mesh: Any) -> None:
    parallelize_module(net, mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})


def _tensor_parallel(net: Net) -> Scaled:
    _split_layers(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Scaled(net)


def _fsdp2_and_tensor_parallel(net: Net) -> Scaled:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    _split_layers(net, mesh["tensor"])
    _shard_layers(net, mesh["data"])
    return Scaled(net, mesh.get_local_rank("data"), 2)


SCHEMES: dict[str, Callable[[Net], Scaled]] = {
    "DDP": _ddp,
    "ZeRO": _ddp_zero,
    "FSDP2": _fsdp2,
    "TP": _tensor_parallel,
    "HSDP": _hsdp,
    "FSDP2 x TP": _fsdp2_and_tensor_parallel,
}
ON_FOUR_RANKS_ONLY = ("HSDP", "FSDP2 x TP")

# All schemes and kinds on two ranks; a selection on four.
SPOTS = (("gradient", "torch.SGD"), ("update", "gradcentral.AdamW"))
MATRIX = [
    (ranks, scheme, placement, kind)
    for ranks in (2, 4)
    for scheme in SCHEMES
    for placement in ("gradient", "update")
    for kind in KINDS
    if ((ranks == 4) == (scheme in ON_FOUR_RANKS_ONLY) and (ranks, kind) != (4, "gradcentral.Adam"))
    or (ranks == 4 and (placement, kind) in SPOTS)
]


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    numbers = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield torch.rand(BATCH, 1, 6, 6, generator=numbers), torch.randint(3, (BATCH,), generator=numbers)


@contextlib.contextmanager
def _without_sync(model: nn.Module) -> Iterator[None]:
    """Do not reduce gradients before the last micro-batch."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    switch = getattr(model, "set_requires_gradient_sync", lambda _: None)
    switch(False)
    yield
    switch(True)


def _train(scaled: Scaled, recipe: Recipe) -> None:
    model = scaled.model
    optimizer = scaled.make_optimizer(recipe, model)
    for x, y in _batches():
        rows = slice(None) if recipe.same_batch else slice(scaled.part, None, scaled.parts)
        micro_batches = [*zip(x[rows].chunk(recipe.micro_batches), y[rows].chunk(recipe.micro_batches), strict=True)]
        for position, (inputs, targets) in enumerate(micro_batches):
            last = position == len(micro_batches) - 1
            with contextlib.nullcontext() if last else _without_sync(model):
                loss = F.cross_entropy(model(inputs), targets) / len(micro_batches)
                torch.autograd.backward(loss)
        if recipe.clip == "after":
            gradcentral.centralize_gradients(model)
        if recipe.clip != "no":
            _clip(model)
        optimizer.step()
        optimizer.zero_grad()


def _clip(model: nn.Module) -> None:
    # torch cannot compute a norm over tensors of different meshes, so clip each tensor by its own norm.
    for parameter in model.parameters():
        clip_grad_norm_([parameter], 0.05)


class Outcome(NamedTuple):
    """The comparison of parameters trained on several ranks with those trained on one."""

    difference: float
    change: float
    equal: bool
    all_reduces: int
    """The all-reduces of centering, over all steps."""


@contextlib.contextmanager
def _counting_all_reduces() -> Iterator[list[int]]:
    """Yield the sizes of the all-reduces of centering, without those of FSDP2."""
    sent: list[int] = []

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return dist.all_reduce(tensor, *arguments, **options)

    with mock.patch.object(distributed, "dist", SimpleNamespace(all_reduce=counted)):
        yield sent


def compare_with_one_rank(scheme: str, recipe: Recipe) -> Outcome:
    """Train on several ranks and on one."""
    torch.manual_seed(3)
    start, one, several = (Net(recipe.checkpointed) for _ in range(3))
    one.load_state_dict(start.state_dict())
    several.load_state_dict(start.state_dict())
    _train(Scaled(one), recipe)
    with _counting_all_reduces() as sent:
        _train(SCHEMES[scheme](several), recipe)
    difference = change = 0.0
    equal = True
    for before, expected, parameter in zip(*(net.parameters() for net in (start, one, several)), strict=True):
        got = parameter.detach()
        got = got.full_tensor() if isinstance(got, DTensor) else got
        difference = max(difference, float((got - expected.detach()).abs().max()))
        change = max(change, float((got - before.detach()).abs().max()))
        equal = equal and torch.equal(got, expected)
    return Outcome(difference, change, equal, len(sent))


def _check(workers: Workers, scheme: str, recipe: Recipe) -> list[Outcome]:
    outcomes = workers.run(compare_with_one_rank, scheme, recipe)
    assert max(outcome.difference for outcome in outcomes) <= 1e-6
    assert min(outcome.change for outcome in outcomes) > 0.01
    assert [outcome.all_reduces for outcome in outcomes] == workers.ranks * [STEPS * _all_reduces(scheme, workers)]
    return outcomes


def _all_reduces(scheme: str, workers: Workers) -> int:
    """Return the number in one step: four ranks cut the groups of ``up``, and TP splits the rows of ``narrow``."""
    return int(scheme in ("TP", "FSDP2 x TP") or (scheme == "FSDP2" and workers.ranks == 4))


@pytest.mark.parametrize(("ranks", "scheme", "placement", "kind"), MATRIX, indirect=["ranks"])
def test_several_ranks_train_like_one(ranks: Workers, scheme: str, placement: str, kind: str) -> None:
    _check(ranks, scheme, Recipe(kind, placement))


VARIANTS = {
    "accumulation": Recipe("gradcentral.AdamW", micro_batches=2),
    "accumulation with a hook": Recipe("torch.SGD", "update", micro_batches=2),
    "clipping before": Recipe("torch.SGD", clip="before"),
    "clipping before a fused step": Recipe("gradcentral.SGD", "update", clip="before"),
    "clipping after": Recipe("torch.SGD", clip="after"),
    "activation checkpointing": Recipe("gradcentral.SGD", checkpointed=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", ["DDP", "FSDP2", "TP"])
def test_variants_of_a_training_loop_on_several_ranks(scheme: str, variant: str, two_ranks: Workers) -> None:
    _check(two_ranks, scheme, VARIANTS[variant])


@pytest.mark.parametrize("variant", ["accumulation", "clipping before a fused step", "clipping after"])
def test_variants_of_a_training_loop_on_a_two_dimensional_mesh(variant: str, four_ranks: Workers) -> None:
    _check(four_ranks, "FSDP2 x TP", VARIANTS[variant])


@pytest.mark.skipif(
    bool(kernels.native.unavailable_reason()), reason="the rounding of torch's sums depends on the shape of the tensor"
)
@pytest.mark.parametrize("kind", ["gradcentral.SGD", "gradcentral.Adam", "gradcentral.AdamW"])
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("scheme", ["DDP", "ZeRO", "FSDP2"])
def test_training_without_a_collective_is_bit_identical(
    scheme: str, placement: str, kind: str, two_ranks: Workers
) -> None:
    # The mean of two equal gradients is exact.
    outcomes = _check(two_ranks, scheme, Recipe(kind, placement, same_batch=True))
    assert all(outcome.equal for outcome in outcomes)
