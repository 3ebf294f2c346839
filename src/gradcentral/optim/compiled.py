"""The fused step under ``torch.compile``: one operator per parameter group, which calls the kernels.

The graph consists of the operator alone: parameters, gradients and state are its inputs, and it writes to them in
place. The learning rate and the strength are inputs too. The compiler sees the signature of the operator only.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gradcentral.kernels import native
from gradcentral.kernels.compiled import decode, encode, on_graph, register
from gradcentral.kernels.forms import Coefficients, DeviceCoefficients, Placement, States, UpdateRule, same_objects
from gradcentral.kernels.planner import KernelGroup, group_by_kernels, kernels_for
from gradcentral.local_shard import any_sharded
from gradcentral.optim.fused import FusedOptimizer
from gradcentral.optim.reference import AdamState, adam_step, sgd_step
from gradcentral.weight_vectors import WeightVectors

__all__ = ["StepPlans", "can_fuse", "fused_step", "may_fuse"]


# Tracing. Dynamo follows `fused_step` line by line, and calls `can_fuse` and `_layout_of` as they are. Their results
# depend only on what Dynamo guards in any case: the parameters, the gradients, the state and the options of the groups.


def may_fuse(group: dict[str, Any]) -> bool:
    """Return whether no option of the group selects torch's own implementation."""
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
    )


@torch.compiler.assume_constant_result
def can_fuse(optimizer: FusedOptimizer) -> bool:
    """Return whether `fused_step` can update every parameter that has a gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(map(may_fuse, optimizer.param_groups)) or any_sharded(params):
        return False
    if not all(map(_is_served, params)):
        return False
    if getattr(optimizer, "found_inf", None) is None:
        return True
    # A first step that a GradScaler skips would still count as the first.
    return all(
        group.get("dampening", 0) == 0 or optimizer.state[p].get("momentum_buffer") is not None
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    )


def _is_served(p: Tensor) -> bool:
    kernels = kernels_for(p)
    held = (p, p.grad)
    return kernels is not None and all(
        tensor is not None
        and tensor.dtype in kernels.DTYPES
        and tensor.layout == torch.strided
        and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in held
    )


@torch.compiler.assume_constant_result
def _layout_of(optimizer: FusedOptimizer, index: int, revision: int) -> str:
    """Return the weight vectors of the parameters of a group that have gradients, as `encode` writes them.

    Args:
        optimizer: the optimizer, which keeps the plans of the group.
        index: the position of the group.
        revision: of the optimizer's layout, on which the result depends.
    """
    targets: dict[Tensor, WeightVectors] = dict(optimizer.targets.current(optimizer).whole)
    params = [p for p in optimizer.param_groups[index]["params"] if p.grad is not None]
    _plans[id(params[0])] = optimizer._compiled.setdefault(index, StepPlans())
    return encode(map(targets.get, params))


@torch.no_grad()
def fused_step(optimizer: FusedOptimizer) -> None:
    """Take the step that ``torch.compile`` traces."""
    for index, group in enumerate(optimizer.param_groups):
        params: list[Tensor] = []
        grads: list[Tensor] = []
        columns: list[list[Any]] = [[], [], [], []]
        rule = optimizer._update_rule(group)
        # Dynamo calls this method of torch as it is, and adds the guards of parameters, gradients and state.
        optimizer._init_group(group, params, grads, *columns[: 4 if rule >= UpdateRule.ADAM else 1])
        if not params:
            continue
        momentum, squares, largest_squares, steps = columns
        fresh = [buffer is None for buffer in momentum]
        momentum = [
            torch.zeros_like(p, memory_format=torch.preserve_format) if buffer is None else buffer
            for p, buffer in zip(params, momentum, strict=False)
        ]
        strength, lr = optimizer.targets.strength_of(group), group["lr"]
        placement = optimizer._placement_of(group, strength)
        coefficients = optimizer._coefficients(group, 1.0, -1.0 if group["maximize"] else 1.0, 1.0)
        if params[0].is_cpu:
            lr, strength = _on_host(lr), _on_host(strength)
        torch.ops.gradcentral.fused_step_(
            params,
            grads,
            momentum,
            squares,
            largest_squares,
            steps,
            lr if isinstance(lr, Tensor) else None,
            strength if isinstance(strength, Tensor) else None,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            [
                *coefficients._replace(
                    lr=1.0 if isinstance(lr, Tensor) else lr, strength=1.0 if isinstance(strength, Tensor) else strength
                )
            ],
            fresh,
            int(rule),
            int(placement),
            _layout_of(optimizer, index, optimizer.targets.layout.revision),
        )
        for p, buffer, is_new in zip(params, momentum, fresh, strict=False):
            if is_new:
                optimizer.state[p]["momentum_buffer"] = buffer


def _on_host(number: float | Tensor) -> Tensor:
    """Return a number as an input of the graph.

    On a CUDA device a float remains part of the graph, as with torch's optimizers, because an operator with inputs on
    the CPU cannot be part of a CUDA graph.
    """
    return number if isinstance(number, Tensor) else on_graph(number)


# The operator.


class _Planned(NamedTuple):
    columns: list[list[Tensor]]
    """The parameters, and each kind of state."""
    groups: list[tuple[KernelGroup, Any]]
    """The kernel calls, each with its plan."""
    rest: list[int]
    """Positions of the parameters that no kernel can update."""

    def fits(self, columns: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]) -> bool:
        """Return whether these are the planned parameters and states, with gradients of the planned form."""
        return all(map(same_objects, self.columns, columns)) and all(
            plan.fits([*group.select(grads)]) for group, plan in self.groups
        )


class StepPlans:
    """The plans of the compiled steps of one parameter group, which its optimizer keeps."""

    def __init__(self) -> None:
        self.planned: dict[object, _Planned] = {}


# By the id of the first parameter, so that the plans, which refer to the parameters, live as long as the optimizer. An
# operator call without an entry, or whose entry does not fit, creates its plans again.
_plans: WeakValueDictionary[int, StepPlans] = WeakValueDictionary()


def _fused_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum: list[Tensor],
    squares: list[Tensor],
    largest_squares: list[Tensor],
    steps: list[Tensor],
    lr: Tensor | None,
    strength: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    coefficients: list[float],
    fresh: list[bool],
    rule: int,
    placement: int,
    vectors: str,
) -> None:
    """Update parameters and state by one step.

    Args:
        params, grads: the parameters and their gradients.
        momentum, squares, largest_squares, steps: the state, as in `States`; empty where the update rule has none.
        lr: the learning rate, if it is not among the coefficients.
        strength: s of P_s, if it is not among the coefficients.
        grad_scale, found_inf: set by a GradScaler.
        coefficients: `Coefficients` for a learning rate of 1, but with the learning rate.
        fresh: whether each momentum buffer is new; empty without momentum.
        rule: the `UpdateRule`.
        placement: the `Placement`.
        vectors: the weight vectors of the parameters (see `encode`).
    """
    numbers = Coefficients(*coefficients)
    rate = numbers.lr if lr is None else float(lr) if lr.is_cpu else lr
    part = numbers.strength if strength is None else float(strength) if strength.is_cpu else strength
    placed = Placement.PLAIN if not isinstance(part, Tensor) and part == 0 else Placement(placement)
    states = States(*(column or None for column in (momentum, squares, largest_squares, steps)))
    planned = _planned(UpdateRule(rule), params, grads, states, placed, vectors)
    of_host = bool(planned.rest) or any(isinstance(plan, native.Plan) for _, plan in planned.groups)
    if found_inf is not None and of_host and found_inf.item():
        return
    is_fresh = fresh if any(fresh) else []
    for group, plan in planned.groups:
        call: Coefficients | DeviceCoefficients
        if isinstance(plan, native.Plan):
            call = _for_host(numbers, rate, part, grad_scale)
        else:
            number = 1.0 if isinstance(part, Tensor) else part
            on_device = part if isinstance(part, Tensor) else None
            call = DeviceCoefficients(numbers._replace(strength=number), rate, grad_scale, found_inf, on_device)
        plan.run([*group.select(grads)], call, [*group.select(is_fresh)] if is_fresh else [])
    for position in planned.rest:
        of_state = States(*(None if column is None else [column[position]] for column in states))
        call = _for_host(numbers, rate, part, grad_scale)._replace(decay=numbers.decay)
        own = None if placed == Placement.PLAIN else decode(vectors)[position]
        _reference_step_(params[position], grads[position], of_state, call, bool(is_fresh) and fresh[position], own, placed)


register(_fused_step_, writes=["params", "momentum", "squares", "largest_squares", "steps"])


def _planned(
    rule: UpdateRule, params: list[Tensor], grads: list[Tensor], states: States, placement: Placement, vectors: str
) -> _Planned:
    kept = _plans.get(id(params[0]))
    key = rule, placement, vectors
    columns = [params, *(column for column in states if column is not None)]
    found = None if kept is None else kept.planned.get(key)
    if found is not None and found.fits(columns, grads):
        return found

    def companions(kernels: ModuleType, position: int) -> list[Tensor] | None:
        buffers = [column[position] for column in states[:3] if column is not None]
        counter = None if states.steps is None else states.steps[position]
        accepted = kernels.accepts(params[position], grads[position], buffers, counter)
        return [grads[position], *buffers] if accepted and len({each.dtype for each in buffers}) <= 1 else None

    centered = decode(vectors)
    groups, rest = group_by_kernels(params, centered, companions)
    planned = _Planned(columns, [], rest)
    for group in groups:
        selected = States(*(None if column is None else [*group.select(column)] for column in states))
        loops = [
            (loop, Placement.PLAIN if each is None else placement)
            for loop, each in zip(group.loops, group.select(centered), strict=True)
        ]
        plan = group.kernels.Plan(rule, [*group.select(params)], [*group.select(grads)], selected, loops)
        planned.groups.append((group, plan))
    if kept is not None:
        kept.planned[key] = planned
    return planned


def _for_host(
    numbers: Coefficients, lr: float | Tensor, strength: float | Tensor, grad_scale: Tensor | None
) -> Coefficients:
    lr = float(lr)
    scale = numbers.scale if grad_scale is None else numbers.scale / float(grad_scale)
    return numbers._replace(lr=lr, decay=lr * numbers.decay, scale=scale, strength=float(strength))


def _reference_step_(
    w: Tensor, g: Tensor, state: States, c: Coefficients, fresh: bool, vectors: WeightVectors | None, placement: Placement
) -> None:
    """Update one parameter that no kernel can update, such as one whose gradient has other strides.

    Args:
        w, g: the parameter and its gradient.
        state: lists of one tensor each.
        c: the coefficients; its ``decay`` is for a learning rate of 1.
        fresh: whether the momentum buffer is new.
        vectors, placement: what is centered.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    m, v, largest_v, steps = (None if column is None else column[0] for column in state)
    old, gradient = w.to(wide), g.to(wide) * c.scale
    name = placement.name.lower()
    written: list[tuple[Tensor | None, Tensor | None]]
    if m is None or v is None:
        momentum = None if m is None or fresh else m.to(wide)
        new, moved = sgd_step(
            old,
            gradient,
            momentum,
            vectors,
            name,
            strength=c.strength,
            lr=c.lr,
            momentum=c.momentum,
            dampening=1 - c.keep,
            weight_decay=c.l2,
            nesterov=bool(c.nesterov),
        )
        written = [(w, new), (m, moved)]
    else:
        largest = v if largest_v is None else largest_v
        assert steps is not None, "Adam counts its steps"
        new, after = adam_step(
            old,
            gradient,
            AdamState(m.to(wide), v.to(wide), largest.to(wide), int(steps)),
            vectors,
            name,
            strength=c.strength,
            lr=c.lr,
            betas=(c.beta1, c.beta2),
            eps=c.epsilon,
            weight_decay=c.decay or c.l2,
            decoupled=c.decay != 0,
            amsgrad=largest_v is not None,
        )
        steps += 1
        written = [(w, new), (m, after.m), (v, after.v), (largest_v, after.largest_v)]
    for tensor, value in written:
        if tensor is not None and value is not None:
            tensor.copy_(value)
