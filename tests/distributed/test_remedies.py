"""The remedy in every message about sharded parameters works: it is read from the message and executed on all ranks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import WeightVectors, weight_layout
from gradcentral.attach import centering_of
from tests.distributed.workers import Workers


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def _placed_model(placement: Any) -> Any:
    """Return a model whose parameters are all DTensors on one mesh."""
    model = _model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        for name, p in [*layer.named_parameters()]:
            placements = [placement if p.ndim == 2 else Replicate()]
            setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
    return model


def _replace_weight(model: Any, make: Callable[[Any], Any]) -> None:
    model[0].weight = nn.Parameter(make(model[0].weight.detach()))


def _assert_step_centers(model: nn.Module, optimizer: Optimizer) -> None:
    """Compare one step of SGD on whole tensors with w − lr·Φ(g)."""
    (targets,) = centering_of(optimizer)
    pairs: list[Any] = [*targets.layout.items()]
    assert {p for p, _ in pairs} <= set(model.parameters())
    assert pairs
    optimizer.zero_grad()
    for p, _ in pairs:
        p.grad = _like(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) + 0.5)
    before = [(_whole(p), _whole(p.grad)) for p, _ in pairs]
    optimizer.step()
    for (p, vectors), (w, g) in zip(pairs, before, strict=True):
        torch.testing.assert_close(_whole(p), w - 0.1 * gradcentral.center(g, vectors), rtol=0, atol=1e-6)


def _like(p: Any, value: Any) -> Any:
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value


def _whole(tensor: Any) -> Any:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _suggested(mistake: Callable[[], object], pattern: str) -> str:
    """Return the suggestion in the message that a mistake causes: the group of the pattern."""
    with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
        mistake()
    found = re.search(pattern, str(raised.value))
    assert found, str(raised.value)
    return found[1]


def _attached(model: nn.Module, **options: Any) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1)
    gradcentral.centralize(optimizer, **({"layout": weight_layout(model, **options)} if options else {"model": model}))
    return optimizer


# Each case runs on every rank.


def skip_a_view_that_cuts_axes() -> None:
    model = _placed_model(Shard(0))
    cut = {"0.weight": WeightVectors((1,), view=(8, 3))}
    excluded = _suggested(lambda: _attached(model, overrides=cut), r"\(exclude=(\[.+?\])\)")
    _assert_step_centers(model, _attached(model, exclude=eval(excluded)))


def replace_a_view_that_cuts_axes() -> None:
    model = _placed_model(Shard(0))
    cut = {"0.weight": WeightVectors((1,), view=(8, 3))}
    override = _suggested(lambda: _attached(model, overrides=cut), r"\(overrides=(\{.+?: …\})\)")
    whole_axes = eval(override.replace("…", "WeightVectors((2,), view=(3, 2, 4))"))
    _assert_step_centers(model, _attached(model, overrides=whole_axes))


def _partial_model() -> Any:
    model = _placed_model(Replicate())
    _replace_weight(model, lambda w: DTensor.from_local(w.to_local(), w.device_mesh, [Partial()]))
    return model


def skip_a_partial_parameter() -> None:
    model = _partial_model()
    excluded = _suggested(lambda: _attached(model), r"\(exclude=(\[.+?\])\)")
    _assert_step_centers(model, _attached(model, exclude=eval(excluded)))


def redistribute_a_partial_parameter() -> None:
    model = _partial_model()
    method = _suggested(lambda: _attached(model), r"(redistribute) it")
    _replace_weight(model, lambda w: getattr(w, method)(placements=[Replicate()]))
    _assert_step_centers(model, _attached(model))


def distribute_an_uneven_parameter() -> None:
    """Distribute a parameter of which one rank holds more rows than `Shard` assigns to it."""
    model = _placed_model(Shard(0))
    overrides = {"0.weight": WeightVectors((1, 2), view=(3, 2, 4))}
    held = 4 if dist.get_rank() == 0 else 2

    def uneven(w: Any) -> Any:
        return DTensor.from_local(
            torch.randn(held, 4), w.device_mesh, [Shard(0)], run_check=False, shape=w.shape, stride=w.stride()
        )

    _replace_weight(model, uneven)
    function = _suggested(lambda: _attached(model, overrides=overrides), r"create it with (distribute_tensor)")
    distribute = getattr(importlib.import_module("torch.distributed.tensor"), function)
    mesh = model[1].weight.device_mesh
    _replace_weight(model, lambda w: distribute(torch.ones(6, 4), mesh, [Shard(0)]))
    _assert_step_centers(model, _attached(model, overrides=overrides))


def distribute_a_plain_gradient() -> None:
    model = _placed_model(Shard(0))
    optimizer = gradcentral.SGD(model, lr=0.1)
    weight = model[0].weight
    weight.grad = gradient = torch.randn(6, 4)
    function = _suggested(optimizer.step, r"convert it with (distribute_tensor)")
    distribute = getattr(importlib.import_module("torch.distributed.tensor"), function)
    weight.grad = distribute(gradient, weight.device_mesh, weight.placements)
    expected = _whole(weight) - 0.1 * gradcentral.center(gradient, WeightVectors((1,)))
    optimizer.step()
    torch.testing.assert_close(_whole(weight), expected, rtol=0, atol=1e-6)


def turn_differentiable_off() -> None:
    model = _placed_model(Shard(1))
    optimizer = gradcentral.SGD(model, lr=0.1, differentiable=True)
    option = _suggested(optimizer.step, r"set (differentiable=False)")
    _assert_step_centers(model, eval(f"gradcentral.SGD(model, lr=0.1, {option})"))


def turn_the_overlap_with_ddp_off() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = _model()

    def make(overlap: str) -> Optimizer:
        optimizer: Optimizer = eval(
            f"ZeroRedundancyOptimizer(model.parameters(), SGD, {overlap}, lr=0.1)",
            {"ZeroRedundancyOptimizer": ZeroRedundancyOptimizer, "SGD": SGD, "model": model},
        )
        gradcentral.centralize(optimizer, model)
        return optimizer

    option = _suggested(lambda: make("overlap_with_ddp=True"), r"create it with (overlap_with_ddp=False)")
    _assert_step_centers(model, make(option))


def attach_after_fully_shard() -> None:
    _attach_after(lambda model, mesh: fully_shard(model, mesh=mesh), "fully_shard")


def attach_after_parallelize_module() -> None:
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    _attach_after(lambda model, mesh: parallelize_module(model, mesh, plan), "parallelize_module")


def _attach_after(shard: Callable[[nn.Module, Any], object], name: str) -> None:
    model = _model()
    optimizer = _attached(model)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    _suggested(optimizer.step, rf"create the optimizer, and attach Gradient Centralization, after .*({name})")
    _assert_step_centers(model, _attached(model))


def use_fully_shard_instead_of_fsdp1() -> None:
    wrapped = FullyShardedDataParallel(_model(), use_orig_params=True, device_id=torch.device("cpu"))
    _shard_as_suggested(lambda: _attached(wrapped))
    _shard_as_suggested(lambda: gradcentral.WeightLayout.from_shapes(wrapped.parameters()))


def use_fully_shard_instead_of_flat_partitions() -> None:
    model = _model()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    _shard_as_suggested(lambda: gradcentral.centralize(SGD([flat], lr=0.1), model))


def use_fully_shard_instead_of_replaced_parameters() -> None:
    model = _model()
    optimizer = _attached(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(45))]
    _shard_as_suggested(optimizer.step)


def _shard_as_suggested(mistake: Callable[[], object]) -> None:
    module, _, function = _suggested(mistake, r"use ([\w.]+\.fully_shard) \(FSDP2\)").rpartition(".")
    model = _model()
    getattr(importlib.import_module(module), function)(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    _assert_step_centers(model, _attached(model))


def use_zero_instead_of_flat_partitions() -> None:
    model = _model()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    name = _suggested(
        lambda: gradcentral.centralize(SGD([flat], lr=0.1), model), r"or (ZeroRedundancyOptimizer), which keep"
    )
    zero = getattr(importlib.import_module("torch.distributed.optim"), name)
    optimizer = zero(model.parameters(), SGD, lr=0.1)
    gradcentral.centralize(optimizer, model)
    _assert_step_centers(model, optimizer)


def attach_to_the_optimizer_of_fully_sharded_parameters() -> None:
    model = _model()
    gradcentral.centralize_in_backward(model)
    late = _model()
    gradcentral.centralize_in_backward(late[1])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fully_shard(late[1], mesh=mesh)
    for mistake in (
        lambda: gradcentral.centralize_in_backward(model),
        lambda: model(torch.randn(5, 4)),
        lambda: late(torch.randn(5, 4)),
    ):
        optimizer = SGD(model.parameters(), lr=0.1)
        exec(_suggested(mistake, r"attach to the optimizer instead, with (gradcentral.+)$"), {**globals(), **locals()})
        _assert_step_centers(model, optimizer)


def attach_to_the_optimizer_under_tensor_parallelism() -> None:
    model = parallelize_module(
        _model(),
        init_device_mesh("cpu", (dist.get_world_size(),)),
        {"0": ColwiseParallel(), "1": RowwiseParallel()},
    )
    remedy = _suggested(
        lambda: gradcentral.centralize_in_backward(model), r"attach to the optimizer instead, with (gradcentral.+)$"
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    exec(remedy, {**globals(), **locals()})
    _assert_step_centers(model, optimizer)


CASES = (
    attach_to_the_optimizer_of_fully_sharded_parameters,
    attach_to_the_optimizer_under_tensor_parallelism,
    skip_a_view_that_cuts_axes,
    replace_a_view_that_cuts_axes,
    skip_a_partial_parameter,
    redistribute_a_partial_parameter,
    distribute_an_uneven_parameter,
    distribute_a_plain_gradient,
    turn_differentiable_off,
    turn_the_overlap_with_ddp_off,
    attach_after_fully_shard,
    attach_after_parallelize_module,
    use_fully_shard_instead_of_fsdp1,
    use_fully_shard_instead_of_flat_partitions,
    use_fully_shard_instead_of_replaced_parameters,
    use_zero_instead_of_flat_partitions,
)


@pytest.mark.parametrize("case", CASES)
def test_the_suggestion_of_a_message_works(case: Callable[[], None], two_ranks: Workers) -> None:
    two_ranks.run(case)
