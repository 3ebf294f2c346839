"""Sharded parameters: collectives of a step, unusual gradients, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Optimizer

import gradcentral
from gradcentral import WeightVectors, weight_layout
from gradcentral.attach import centering_of
from gradcentral.local_shard import runs_of_axes
from tests.distributed.sharding import shard_and_average
from tests.distributed.workers import Workers

BOTH = pytest.mark.parametrize("placement", ["gradient", "update"])
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["hook", "fused"])


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


class Rows(nn.Module):
    """Linear layers of the given shapes and placement; under Shard(1) their weight vectors are split."""

    def __init__(self, placement: Any, shapes: tuple[tuple[int, int], ...] = ((6, 8), (4, 6), (5, 4))) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
        numbers = torch.Generator().manual_seed(1)
        for layer, shape in zip(self.layers, shapes, strict=True):
            weight = distribute_tensor(torch.randn(*shape, generator=numbers), _mesh(), [placement])
            layer.weight = nn.Parameter(weight)

    def gradients(self, seed: int) -> list[Any]:
        """Return random gradients with the placements of the parameters."""
        numbers = torch.Generator().manual_seed(seed)
        weights: list[Any] = [*self.parameters()]
        return [
            distribute_tensor(torch.randn(*w.shape, generator=numbers) + 0.5, w.device_mesh, w.placements)
            for w in weights
        ]


def _optimizer(model: nn.Module, placement: str, fused: bool) -> Optimizer:
    if fused:
        return gradcentral.SGD(model, lr=0.1, momentum=0.9, placement=placement)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradcentral.centralize(optimizer, model, placement)
    return optimizer


class Sent(NamedTuple):
    """The collectives of one step, and the number of elements in its all-reduces."""

    all_reduces: int
    others: int
    elements: int


def count_collectives(dim: int, placement: str, fused: bool, without_gradients: bool) -> Sent:
    """Count the collectives of a step with all gradients, or with none."""
    model = Rows(Shard(dim))
    optimizer = _optimizer(model, placement, fused)
    if not without_gradients:
        for weight, gradient in zip(model.parameters(), model.gradients(2), strict=True):
            weight.grad = gradient
    sent = []
    all_reduce = dist.all_reduce

    def recording(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = recording
    try:
        with CommDebugMode() as counted:
            optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return Sent(len(sent), counted.get_total_counts() - len(sent), sum(sent))


@pytest.mark.parametrize("without_gradients", [False, True], ids=["", "without gradients"])
@FUSED
@BOTH
def test_split_weight_vectors_take_one_all_reduce_of_one_number_each(
    placement: str, fused: bool, without_gradients: bool, two_ranks: Workers
) -> None:
    for sent in two_ranks.run(count_collectives, 1, placement, fused, without_gradients):
        assert sent == Sent(all_reduces=1, others=0, elements=6 + 4 + 5)


@FUSED
@BOTH
def test_whole_weight_vectors_take_no_collective(placement: str, fused: bool, two_ranks: Workers) -> None:
    for sent in two_ranks.run(count_collectives, 0, placement, fused, False):
        assert sent == Sent(all_reduces=0, others=0, elements=0)


def _center_rows(whole: list[Tensor]) -> list[Tensor]:
    return [tensor - tensor.mean(1, keepdim=True) for tensor in whole]


def step_where_a_rank_has_no_gradients(placement: str, fused: bool) -> float:
    """Step where the last rank has no gradient of the first layer, and no rank has one of the second."""
    model = Rows(Shard(1))
    weights: list[Any] = [*model.parameters()]
    before = [weight.detach().full_tensor() for weight in weights]
    optimizer = _optimizer(model, placement, fused)
    gradients = model.gradients(2)
    whole = [gradient.full_tensor() for gradient in gradients]
    last = dist.get_rank() == dist.get_world_size() - 1
    if not last:
        weights[0].grad = gradients[0]
    weights[2].grad = gradients[2]
    optimizer.step()
    whole[0][:, -(-8 // dist.get_world_size()) * (dist.get_world_size() - 1) :] = 0
    whole[1].zero_()
    expected = [weight - 0.1 * change for weight, change in zip(before, _center_rows(whole), strict=True)]
    if placement == "gradient":  # torch's optimizers do not update a parameter without a gradient
        updated = distribute_tensor(expected[0], _mesh(), [Shard(1)]).to_local()
        unchanged = distribute_tensor(before[0], _mesh(), [Shard(1)]).to_local()
        parts = [unchanged if last else updated]
    else:
        parts = [distribute_tensor(expected[0], _mesh(), [Shard(1)]).to_local()]
    parts += [distribute_tensor(tensor, _mesh(), [Shard(1)]).to_local() for tensor in expected[1:]]
    got = [weight.detach().to_local() for weight in weights]
    return max(float((one - other).abs().max()) for one, other in zip(got, parts, strict=True))


@FUSED
@BOTH
def test_ranks_may_have_gradients_of_different_parameters(placement: str, fused: bool, two_ranks: Workers) -> None:
    assert max(two_ranks.run(step_where_a_rank_has_no_gradients, placement, fused)) <= 1e-6


def step_with_partial_gradients(dim: int | None, placement: str, fused: bool) -> float:
    """Step where each rank holds a summand of the gradient (Partial), as tensor parallelism leaves it."""
    placed = Replicate() if dim is None else Shard(dim)
    model = Rows(placed)
    weights: list[Any] = [*model.parameters()]
    before = [weight.detach().full_tensor().clone() for weight in weights]
    optimizer = _optimizer(model, placement, fused)
    whole = [gradient.full_tensor() for gradient in model.gradients(2)]
    part = 0.25 if dist.get_rank() == 0 else 0.75 / (dist.get_world_size() - 1)
    for weight, gradient in zip(weights, whole, strict=True):
        weight.grad = DTensor.from_local(part * gradient, _mesh(), [Partial()])
    optimizer.step()
    expected = [weight - 0.1 * gradient for weight, gradient in zip(before, _center_rows(whole), strict=True)]
    got = [weight.detach().full_tensor() for weight in weights]
    return max(float((one - other).abs().max()) for one, other in zip(got, expected, strict=True))


@FUSED
@BOTH
@pytest.mark.parametrize("dim", [None, 0, 1], ids=["replicas", "rows", "columns"])
def test_partial_gradients_are_summed_first(dim: int | None, placement: str, fused: bool, two_ranks: Workers) -> None:
    assert max(two_ranks.run(step_with_partial_gradients, dim, placement, fused)) <= 1e-6


def center_expanded_gradients(dim: int) -> float:
    """Center the gradients of a sum, which are a single number, expanded."""
    model = Rows(Shard(dim))
    for weight in model.parameters():
        torch.autograd.backward(weight.sum())
    gradcentral.centralize_gradients(model)
    gradients: list[Any] = [weight.grad for weight in model.parameters()]
    return max(float(gradient.to_local().abs().max()) for gradient in gradients)


@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_gradients_are_centered(dim: int, two_ranks: Workers) -> None:
    assert max(two_ranks.run(center_expanded_gradients, dim)) <= 1e-6


def center_in_dtype(dtype: torch.dtype) -> tuple[bool, float]:
    """Center split gradients of this dtype and compare with float64."""
    model = Rows(Shard(1)).to(dtype)
    for weight, gradient in zip(model.parameters(), model.gradients(2), strict=True):
        weight.grad = gradient.to(dtype)
    gradients: list[Any] = [weight.grad for weight in model.parameters()]
    expected = _center_rows([gradient.full_tensor().double() for gradient in gradients])
    gradcentral.centralize_gradients(model)
    got = [gradient.full_tensor() for gradient in gradients]
    worst = max(float((one.double() - other).abs().max()) for one, other in zip(got, expected, strict=True))
    return all(tensor.dtype == dtype for tensor in got), worst


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-15), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_sums_are_computed_in_float32_or_wider(dtype: torch.dtype, limit: float, two_ranks: Workers) -> None:
    for kept, worst in two_ranks.run(center_in_dtype, dtype):
        assert kept
        assert worst <= limit


def error_of_cut_view() -> str:
    """Attach with a view that cuts across the parameter's axes."""
    model = Rows(Shard(0), shapes=((4, 6),))
    layout = weight_layout(model, overrides={"layers.0.weight": WeightVectors((1,), view=(6, 4))})
    with pytest.raises(ValueError, match="cuts across its axes") as raised:
        gradcentral.centralize(torch.optim.SGD(model.parameters(), lr=0.1), layout=layout)
    return str(raised.value)


def test_a_view_that_cuts_across_axes_raises(two_ranks: Workers) -> None:
    for message in two_ranks.run(error_of_cut_view):
        assert "layers.0.weight" in message
        assert "exclude=['layers.0.weight']" in message


def error_of_partial_parameter() -> str:
    """Create an optimizer for a Partial parameter."""
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(torch.randn(3, 4), _mesh(), [Partial()]))
    with pytest.raises(ValueError, match="only Shard and Replicate") as raised:
        gradcentral.SGD(model, lr=0.1)
    return str(raised.value)


def test_a_partial_parameter_raises(two_ranks: Workers) -> None:
    for message in two_ranks.run(error_of_partial_parameter):
        assert message.startswith("weight is a DTensor with placements")


def error_of_differentiable_step() -> None:
    """Take a differentiable step with DTensors."""
    model = Rows(Shard(1))
    optimizer = gradcentral.SGD(model, lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True cannot be used with DTensors"):
        optimizer.step()


def test_a_differentiable_step_raises(two_ranks: Workers) -> None:
    two_ranks.run(error_of_differentiable_step)


def resume_from_state(placement: str) -> bool:
    """Step an optimizer and another one that has loaded its state."""
    one, other = Rows(Shard(1)), Rows(Shard(1))
    optimizers = [gradcentral.AdamW(model, lr=0.1, placement=placement) for model in (one, other)]
    for step in range(3):
        for weight, gradient in zip(one.parameters(), one.gradients(step), strict=True):
            weight.grad = gradient
        optimizers[0].step()
    other.load_state_dict(one.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((one, other), optimizers, strict=True):
        for weight, gradient in zip(model.parameters(), model.gradients(7), strict=True):
            weight.grad = gradient
        optimizer.step()
    pairs: Any = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first.to_local(), second.to_local()) for first, second in pairs)


@BOTH
def test_resuming_from_a_state_dict_is_bit_identical(placement: str, two_ranks: Workers) -> None:
    assert all(two_ranks.run(resume_from_state, placement))


def take_a_paused_step() -> bool:
    """Compare a paused step with a step of an optimizer that does not center."""
    plain, paused = Rows(Shard(1)), Rows(Shard(1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, paused)]
    handle = gradcentral.centralize(optimizers[1], paused)
    for model in (plain, paused):
        for weight, gradient in zip(model.parameters(), model.gradients(2), strict=True):
            weight.grad = gradient
    optimizers[0].step()
    with handle.paused():
        optimizers[1].step()
    pairs: Any = zip(plain.parameters(), paused.parameters(), strict=True)
    return all(torch.equal(first.to_local(), second.to_local()) for first, second in pairs)


def test_paused_steps_do_not_center(two_ranks: Workers) -> None:
    assert all(two_ranks.run(take_a_paused_step))


def step_and_compare_gradients() -> bool:
    """Take a fused step and a step of torch's own; check that the gradients are unchanged."""
    model = Rows(Shard(1))
    gradients = model.gradients(2)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        weight.grad = gradient
    copies = [gradient.to_local().clone() for gradient in gradients]
    for foreach in (None, True):
        gradcentral.SGD(model, lr=0.1, foreach=foreach).step()
    kept = all(weight.grad is gradient for weight, gradient in zip(model.parameters(), gradients, strict=True))
    return kept and all(torch.equal(g.to_local(), copy) for g, copy in zip(gradients, copies, strict=True))


def test_the_optimizers_leave_gradients_unchanged(two_ranks: Workers) -> None:
    assert all(two_ranks.run(step_and_compare_gradients))


def count_collectives_with_a_frozen_parameter() -> Sent:
    """Center the gradients of a model with one frozen parameter."""
    model = Rows(Shard(1))
    next(model.parameters()).requires_grad_(False)
    with CommDebugMode() as counted:
        gradcentral.centralize_gradients(model)
    return Sent(counted.get_total_counts(), 0, 0)


def test_centralize_gradients_takes_one_all_reduce(two_ranks: Workers) -> None:
    for sent in two_ranks.run(count_collectives_with_a_frozen_parameter):
        assert sent.all_reduces == 1


# Models that were sharded too late, or flattened.


def error_of_late_sharding(how: str) -> str:
    """Shard a model after creating its optimizer, and step."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fused = how.startswith("fused")
    if fused:
        options: dict[str, Any] = {"foreach": True} if how.endswith("foreach") else {}
        optimizer: Optimizer = gradcentral.SGD(model, lr=0.1, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradcentral.centralize(optimizer, model)
    if how == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped: nn.Module = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=_mesh())
        wrapped = model
    torch.autograd.backward(wrapped(torch.randn(2, 4)).sum())
    with pytest.raises((RuntimeError, ValueError)) as raised:
        optimizer.step()
    return str(raised.value)


@pytest.mark.parametrize("how", ["hook", "fused", "fused foreach"])
def test_sharding_after_attaching_raises_at_the_first_step(how: str, two_ranks: Workers) -> None:
    for message in two_ranks.run(error_of_late_sharding, how):
        assert "the model no longer uses (0.weight, 0.bias, 1.weight, …)" in message
        assert "after fully_shard" in message


def step_with_gathered_parameters() -> bool:
    """Run a forward pass without backward before the step: FSDP2 leaves gathered parameters in the model."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fully_shard(model, mesh=_mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradcentral.centralize(optimizer, model)
    held: list[Any] = [*model.parameters()]
    torch.autograd.backward(model(torch.randn(2, 4)).sum())
    with torch.no_grad():
        model(torch.randn(2, 4))
    gathered = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer.step()
    means = [parameter.grad.full_tensor().mean(1).abs().max() for parameter in held if parameter.ndim == 2]
    return gathered and max(means) < 1e-6


def test_gathered_parameters_do_not_raise(two_ranks: Workers) -> None:
    assert all(two_ranks.run(step_with_gathered_parameters))


def error_of_flat_parameters(how: str) -> str:
    """Attach to a model that FSDP1 has flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model = FullyShardedDataParallel(inner, use_orig_params=how != "flat parameters", device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts: dict[str, Callable[[], Any]] = {
        "shapes": lambda: gradcentral.WeightLayout.from_shapes(model.parameters()),
        "inner model": lambda: gradcentral.centralize(optimizer, inner),
    }
    with pytest.raises(ValueError, match="FSDP1") as raised:
        attempts.get(how, lambda: gradcentral.centralize(optimizer, model))()
    return str(raised.value)


@pytest.mark.parametrize("how", ["wrapped model", "inner model", "flat parameters", "shapes"])
def test_attaching_to_fsdp1_raises(how: str, two_ranks: Workers) -> None:
    for message in two_ranks.run(error_of_flat_parameters, how):
        assert "FullyShardedDataParallel (FSDP1)" in message
        assert "fully_shard (FSDP2)" in message


def test_fsdp1_after_attaching_raises_at_the_first_step(two_ranks: Workers) -> None:
    for message in two_ranks.run(error_of_late_sharding, "FSDP1"):
        assert "FullyShardedDataParallel (FSDP1)" in message


def error_of_overlapping_zero() -> None:
    """Attach to a ZeroRedundancyOptimizer that steps inside DDP's communication."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(4, 3)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(ValueError, match="overlap_with_ddp=False"):
        gradcentral.centralize(optimizer, model)


def test_zero_that_overlaps_with_ddp_raises(two_ranks: Workers) -> None:
    two_ranks.run(error_of_overlapping_zero)


def step_where_a_rank_owns_the_bias() -> list[int]:
    """Step where ZeroRedundancyOptimizer gives one rank the weight and the other the bias."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(4, 3)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), gradcentral.SGD, lr=0.1, model=model)
    torch.autograd.backward(model(torch.randn(2, 4)).sum())
    optimizer.step()
    return [parameter.ndim for group in optimizer.optim.param_groups for parameter in group["params"]]


def test_a_rank_may_own_no_parameter_to_center(two_ranks: Workers) -> None:
    assert two_ranks.run(step_where_a_rank_owns_the_bias) == [[2], [1]]


def test_runs_of_axes() -> None:
    def runs(shape: tuple[int, ...], span: tuple[int, ...], view: tuple[int, ...] | None = None) -> Any:
        return runs_of_axes(WeightVectors(span, view, shape))

    assert runs((3, 4), (1,)) == [[(3, False)], [(4, True)]]
    assert runs((6, 1), (0,)) == [[(6, True)], []]
    assert runs((6, 4), (1,), (2, 3, 4)) == [[(2, False), (3, True)], [(4, False)]]
    assert runs((6, 4), (0, 1), (2, 3, 4)) == [[(6, True)], [(4, False)]]
    assert runs((3, 4, 5), (0,), (12, 5)) == [[(3, True)], [(4, True)], [(5, False)]]
    assert runs((4, 6), (0,), (2, 12)) == [[(2, True), (2, False)], [(6, False)]]
    assert runs((4, 6), (0,), (6, 4)) is None


def center_columns_sharded_by(axis: int) -> tuple[float, int]:
    """Center columns, as in GPT-2's Conv1D, under FSDP2."""
    model = nn.Linear(6, 4, bias=False)
    fully_shard(model, mesh=_mesh(), shard_placement_fn=lambda _: Shard(axis))
    layout = weight_layout(model, overrides={"weight": WeightVectors((0,))})
    torch.autograd.backward(model(torch.randn(3, 6)).square().sum())
    with CommDebugMode() as counted:
        gradcentral.centralize_gradients(layout=layout)
    gradient: Any = model.weight.grad
    return float(gradient.full_tensor().mean(0).abs().max()), counted.get_total_counts()


@pytest.mark.parametrize(("axis", "all_reduces"), [(0, 1), (1, 0)])
def test_sharding_the_other_axis_keeps_columns_whole(axis: int, all_reduces: int, two_ranks: Workers) -> None:
    for worst, counted in two_ranks.run(center_columns_sharded_by, axis):
        assert worst <= 1e-6
        assert counted == all_reduces


def step_in_different_orders(placement: str, fused: bool) -> float:
    """Step where the ranks' optimizers hold the parameters in different orders; two have the same shape."""
    model = Rows(Shard(1), ((6, 8), (6, 8), (5, 6)))
    weights: list[Any] = [*model.parameters()]
    before = [weight.detach().full_tensor() for weight in weights]
    order = weights if dist.get_rank() % 2 else weights[::-1]
    optimizer: Optimizer
    if fused:
        optimizer = gradcentral.SGD(order, lr=0.1, model=model, placement=placement)
    else:
        optimizer = torch.optim.SGD(order, lr=0.1)
        gradcentral.centralize(optimizer, model, placement)
    for weight, gradient in zip(weights, model.gradients(2), strict=True):
        weight.grad = gradient
    whole = [weight.grad.full_tensor() for weight in weights]
    optimizer.step()
    expected = [weight - 0.1 * change for weight, change in zip(before, _center_rows(whole), strict=True)]
    after = [weight.detach().full_tensor() for weight in weights]
    return max(float((one - other).abs().max()) for one, other in zip(after, expected, strict=True))


@FUSED
@BOTH
def test_ranks_may_hold_parameters_in_different_orders(placement: str, fused: bool, two_ranks: Workers) -> None:
    assert max(two_ranks.run(step_in_different_orders, placement, fused)) < 1e-6


def train_while_parameters_change(placement: str, fused: bool) -> tuple[float, float]:
    """Train with FSDP2: unfreeze a layer, then move all parameters to new memory.

    Return the drift of the means and the smallest change of a layer in the last step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    for part in (*model, model):
        shard_and_average(part, _mesh())
    model[0].requires_grad_(False)
    optimizer = _optimizer(model, placement, fused)
    weights: list[Any] = [layer.weight for layer in model]
    start = [weight.full_tensor().mean(1) for weight in weights]
    before: list[Tensor] = []
    for step in range(4):
        if step == 1:
            model[0].requires_grad_(True)
        if step == 3:
            model.double().float()
            before = [weight.full_tensor().clone() for weight in weights]
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    change = min(float((w.full_tensor() - old).abs().max()) for w, old in zip(weights, before, strict=True))
    drift = max(float((w.full_tensor().mean(1) - old).abs().max()) for w, old in zip(weights, start, strict=True))
    return drift, change


@FUSED
@BOTH
def test_unfrozen_and_moved_parameters_are_centered(placement: str, fused: bool, two_ranks: Workers) -> None:
    for drift, change in two_ranks.run(train_while_parameters_change, placement, fused):
        assert drift < 1e-6
        assert change > 1e-4


def step_while_parameters_are_gathered(kind: str) -> tuple[bool, list[str], float]:
    """Run the model under no_grad between backward and step, which leaves its parameters gathered.

    Return whether they were gathered, the names of the centered parameters, and the drift of the means.
    """
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    fully_shard(model, mesh=_mesh())
    weights = [layer.weight for layer in model]
    optimizer = _optimizer(model, "gradient", kind == "fused")
    if kind == "parameters only":
        optimizer = gradcentral.SGD(model.parameters(), lr=0.1)
    start = [weight.full_tensor().mean(1) for weight in weights]
    gathered = True
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        if step % 2:
            with torch.no_grad():
                model(torch.randn(3, 4))
            gathered = gathered and not any(isinstance(p, DTensor) for p in model.parameters())
        optimizer.step()
        model.reshard()
    drift = max(float((w.full_tensor().mean(1) - old).abs().max()) for w, old in zip(weights, start, strict=True))
    (targets,) = centering_of(optimizer)
    names = [targets.layout.names[p] for p in targets.layout]
    assert all(isinstance(p, DTensor) for p in targets.layout)
    return gathered, names, drift


@pytest.mark.parametrize("kind", ["hook", "fused", "parameters only"])
def test_gathered_parameters_are_not_taken_for_new_ones(kind: str, two_ranks: Workers) -> None:
    for gathered, names, drift in two_ranks.run(step_while_parameters_are_gathered, kind):
        assert gathered
        assert names == ["0.weight", "1.weight"]
        assert drift < 1e-6
