"""The fused step under ``torch.compile``: one operator per parameter group, which calls the kernels.

The graph consists of these operators alone. Parameters, gradients and state are inputs of the graph, and the operators
write to them in place. The learning rate and the strength are inputs too, so that new values need no compilation. The
compiler sees only the signature of the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gradcentral.kernels import native
from gradcentral.kernels.compiled import decode, encode, on_graph, register
from gradcentral.kernels.forms import (
    Coefficients,
    DeviceCoefficients,
    Placement,
    States,
    UpdateRule,
    all_match,
    same_objects,
)
from gradcentral.kernels.planner import KernelGroup, group_by_kernels, kernels_for, loop_of
from gradcentral.local_shard import any_sharded
from gradcentral.optim.fused import STATE_KEYS, FusedOptimizer
from gradcentral.projection import checked_strength
from gradcentral.weight_vectors import WeightVectors

__all__ = ["StepPlans", "TracedOptimizer", "may_fuse"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def may_fuse(group: dict[str, Any]) -> bool:
    """Return whether no option of the group selects torch's own implementation."""
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
    )


def _constant_result(method: _Method) -> _Method:
    """Mark a method that Dynamo calls while it compiles, taking the result as a constant.

    This is ``torch.compiler.assume_constant_result``, which would import the compiler, in about a second.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class TracedOptimizer(FusedOptimizer):
    """The step that ``torch.compile`` traces.

    It traces `_fused_step` line by line, but calls the methods marked with `_constant_result` while it compiles and
    takes their results as constants. These may depend only on what is guarded in any case: the parameters and states,
    which parameters have gradients, the options of the groups, and the arguments of the methods. The strides of
    gradients are not guarded, so the operator accepts any; code that Inductor has generated refuses other strides than
    when it was compiled, as it does with torch's optimizers.
    """

    _init_group: Callable[..., Any]
    """torch's method that creates the state of a group and appends its tensors to the lists passed to it."""
    _compiled: dict[int, StepPlans]
    """For each parameter group, the plans of its compiled steps."""

    @_constant_result
    def _can_fuse(self, may_skip: bool) -> bool:
        """Return whether `_fused_step` can update every parameter that has a gradient.

        Args:
            may_skip: whether a GradScaler decides if this step is skipped.
        """
        if not all(map(may_fuse, self.param_groups)) or any_sharded(p for g in self.param_groups for p in g["params"]):
            return False
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        targets: dict[Tensor, WeightVectors] = dict(self.targets.current(self).whole)
        if not all(self._is_served(group, p, targets.get(p)) for group, members in groups for p in members):
            return False
        # A first step that a GradScaler skips would still count as the first, and would not be dampened.
        return not may_skip or all(
            self.state[p].get("momentum_buffer") is not None
            for group, members in groups
            for p in members
            if group.get("dampening", 0) != 0
        )

    def _is_served(self, group: dict[str, Any], p: Tensor, vectors: WeightVectors | None) -> bool:
        """Return whether kernels can update a parameter; a state that it lacks will be created with its form."""
        kernels = kernels_for(p)
        if kernels is None or loop_of(kernels, p, vectors) is None:
            return False
        state, keys = self.state.get(p, {}), STATE_KEYS[self._update_rule(group)].values()
        buffers = [state[key] for key in keys if key != "step" and state.get(key) is not None]
        counter: Tensor | None = None
        if "step" in keys:  # Dynamo moves the counter to the device of the parameter
            counter = state["step"].to(p.device) if "step" in state else torch.tensor(0.0, device=p.device)
        return _accepts(kernels, p, _with_strides_of(p, cast("Tensor", p.grad)), buffers, counter)

    @_constant_result
    def _layout_of(self, index: int) -> str:
        """Return the weight vectors of the parameters of a group that have gradients, as `encode` writes them.

        The optimizer keeps the plans of its groups.
        """
        targets: dict[Tensor, WeightVectors] = dict(self.targets.current(self).whole)
        params = [p for p in self.param_groups[index]["params"] if p.grad is not None]
        _plans[id(params[0])] = self._compiled.setdefault(index, StepPlans())
        return encode(map(targets.get, params))

    @_constant_result
    def _current_revision(self) -> int:
        """Return the revision of the layout, after parameters that are new to it have been looked up."""
        self.targets.current(self)
        return self.targets.layout.revision

    @torch.no_grad()
    def _fused_step(self) -> None:
        """Take the step that ``torch.compile`` traces."""
        # They never differ here. The comparison makes Dynamo guard the revision, on which `_layout_of` depends.
        if self._current_revision() != self.targets.layout.revision:
            raise RuntimeError("the layout changed while the step was compiled")
        for index, group in enumerate(self.param_groups):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            columns: list[list[Any]] = [[], [], [], []]  # in the order of `States`, as torch's method fills them
            rule = self._update_rule(group)
            # Dynamo calls this method of torch as it is, and guards parameters, gradients and state.
            self._init_group(group, params, grads, *columns[: 4 if rule >= UpdateRule.ADAM else 1])
            if not params:
                continue
            fresh = [buffer is None for buffer in columns[0]]
            columns[0] = [
                torch.zeros_like(p, memory_format=torch.preserve_format) if buffer is None else buffer
                for p, buffer in zip(params, columns[0], strict=False)
            ]
            lr, strength = group["lr"], self.targets.strength_of(group)
            placement = self._placement_of(group, strength)
            # On a CUDA device a float stays a constant, as with torch's optimizers, because a graph with inputs on the
            # host cannot become a CUDA graph.
            if params[0].is_cpu:
                lr = lr if isinstance(lr, Tensor) else on_graph(lr)
                strength = strength if isinstance(strength, Tensor) or strength == 1 else on_graph(strength)
            coefficients = self._coefficients(group, 1.0, -1.0 if group["maximize"] else 1.0, 1.0)
            coefficients = coefficients._replace(lr=_number(lr), strength=_number(strength))
            torch.ops.gradcentral.fused_step_(
                params,
                grads,
                *columns,
                fresh,
                int(rule),
                int(placement),
                self._layout_of(index),
                [*coefficients],
                lr if isinstance(lr, Tensor) else None,
                strength if isinstance(strength, Tensor) else None,
                getattr(self, "grad_scale", None),
                getattr(self, "found_inf", None),
            )
            for p, buffer, is_new in zip(params, columns[0], fresh, strict=False):
                if is_new:
                    self.state[p]["momentum_buffer"] = buffer


def _accepts(kernels: Any, p: Tensor, grad: Tensor, buffers: Sequence[Tensor], counter: Tensor | None) -> bool:
    """Return whether these kernels can update a parameter with this gradient and state in one call."""
    return kernels.accepts(p, grad, buffers, counter) and len({buffer.dtype for buffer in buffers}) <= 1


def _with_strides_of(p: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient with the strides of its parameter, which is a copy if they were different."""
    dense = type(grad) in (Tensor, torch.nn.Parameter) and grad.layout == torch.strided
    if not dense or all_match(p, [grad], (grad.dtype,)):
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def _number(value: float | Tensor) -> float:
    """Return the value to put among the coefficients, which a tensor replaces."""
    return 1.0 if isinstance(value, Tensor) else value


def _fused_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum: list[Tensor],
    squares: list[Tensor],
    largest_squares: list[Tensor],
    steps: list[Tensor],
    fresh: list[bool],
    rule: int,
    placement: int,
    vectors: str,
    coefficients: list[float],
    lr: Tensor | None,
    strength: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update the parameters and their state by one step.

    Args:
        params, grads: the parameters and their gradients.
        momentum, squares, largest_squares, steps: the state, as in `States`; empty where the update rule has none.
        fresh: whether each momentum buffer is new; empty if there are none.
        rule: the `UpdateRule`.
        placement: the `Placement` of the parameters that are centered.
        vectors: their weight vectors, and those of the others, as `encode` writes them.
        coefficients: `Coefficients`, with the learning rate, but otherwise for one of 1, and for unscaled gradients.
        lr, strength: take the place of those among the coefficients.
        grad_scale, found_inf: set by a GradScaler.
    """
    states = States(*(column or None for column in (momentum, squares, largest_squares, steps)))
    numbers = _Numbers.of(Coefficients(*coefficients), lr, strength, grad_scale, found_inf)
    placed = Placement.PLAIN if numbers.switched_off else Placement(placement)
    planned, grads = _planned(UpdateRule(rule), params, grads, states, placed, vectors)
    on_host = any(isinstance(plan, native.Plan) for _, plan in planned.groups)
    if found_inf is not None and on_host and found_inf.item():
        return
    is_fresh = fresh if any(fresh) else []
    for group, plan in planned.groups:
        call = numbers.on_host() if isinstance(plan, native.Plan) else numbers.on_device()
        plan.run([*group.select(grads)], call, [*group.select(is_fresh)] if is_fresh else [])


register(_fused_step_, writes=["params", "momentum", "squares", "largest_squares", "steps"])


class _Numbers(NamedTuple):
    """The coefficients of a step, some of them on the device."""

    of_unit_lr: Coefficients
    """For a learning rate of 1 and unscaled gradients."""
    lr: float | Tensor
    strength: float | Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(
        cls,
        coefficients: Coefficients,
        lr: Tensor | None,
        strength: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> _Numbers:
        """Read what is on the CPU; reading the rest would wait for the device."""

        def read(tensor: Tensor | None, number: float) -> float | Tensor:
            return number if tensor is None else float(tensor) if tensor.is_cpu else tensor

        s = checked_strength(read(strength, coefficients.strength))
        return cls(coefficients, read(lr, coefficients.lr), s, grad_scale, found_inf)

    @property
    def switched_off(self) -> bool:
        """Whether the strength is 0, where a mean need not exist."""
        return not isinstance(self.strength, Tensor) and self.strength == 0

    def on_host(self) -> Coefficients:
        """Return the coefficients for the C kernels."""
        lr, scale = float(self.lr), self.of_unit_lr.scale
        return self.of_unit_lr._replace(
            lr=lr,
            decay=lr * self.of_unit_lr.decay,
            scale=scale if self.grad_scale is None else scale / float(self.grad_scale),
            strength=float(self.strength),
        )

    def on_device(self) -> DeviceCoefficients:
        """Return the coefficients for the Triton kernels."""
        on_device = self.strength if isinstance(self.strength, Tensor) else None
        number = 1.0 if isinstance(self.strength, Tensor) else self.strength
        coefficients = self.of_unit_lr._replace(strength=number)
        return DeviceCoefficients(coefficients, self.lr, self.grad_scale, self.found_inf, on_device)


class _Planned(NamedTuple):
    columns: list[list[Tensor]]
    """The parameters and each kind of state."""
    groups: list[tuple[KernelGroup, Any]]
    """The kernel calls, each with its plan."""

    def fits(self, columns: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]) -> bool:
        """Return whether these are the planned parameters and states, with gradients of the planned form."""
        return all(map(same_objects, self.columns, columns)) and all(
            plan.fits([*group.select(grads)]) for group, plan in self.groups
        )


class StepPlans:
    """The plans of the compiled steps of one parameter group, kept by its optimizer."""

    def __init__(self) -> None:
        self.planned: dict[object, _Planned] = {}


# By the id of the first parameter. The entry lives as long as the optimizer, and so does the parameter. A call that
# finds no entry, or one that does not fit, plans again.
_plans: WeakValueDictionary[int, StepPlans] = WeakValueDictionary()


def _planned(
    rule: UpdateRule, params: list[Tensor], grads: list[Tensor], states: States, placement: Placement, vectors: str
) -> tuple[_Planned, list[Tensor]]:
    """Return the plans, and the gradients with the strides that they require.

    Raises:
        RuntimeError: the kernels that the compiled step calls can no longer update a parameter.
    """
    kept = _plans.get(id(params[0]))
    key = rule, placement, vectors
    columns = [params, *(column for column in states if column is not None)]
    found = None if kept is None else kept.planned.get(key)
    if found is not None and found.fits(columns, grads):
        return found, grads
    grads = [*map(_with_strides_of, params, grads)]
    if found is not None and found.fits(columns, grads):
        return found, grads

    def companions(kernels: ModuleType, position: int) -> list[Tensor] | None:
        kinds = (states.momentum, states.squares, states.largest_squares)
        buffers = [column[position] for column in kinds if column is not None]
        counter = None if states.steps is None else states.steps[position]
        accepted = _accepts(kernels, params[position], grads[position], buffers, counter)
        return [grads[position], *buffers] if accepted else None

    centered = decode(vectors)
    groups, rest = group_by_kernels(params, centered, companions)
    if rest:
        raise RuntimeError(
            f"the compiled step cannot update a parameter of shape {tuple(params[rest[0]].shape)}: it, its gradient or "
            "its state has another type or other strides than when the step was compiled; call torch.compiler.reset(), "
            "so that the next call compiles it again"
        )
    planned = _Planned(columns, [])
    for group in groups:
        selected = States(*(None if column is None else [*group.select(column)] for column in states))
        placements = [Placement.PLAIN if each is None else placement for each in group.select(centered)]
        loops = [*zip(group.loops, placements, strict=True)]
        plan = group.kernels.Plan(rule, [*group.select(params)], [*group.select(grads)], selected, loops)
        planned.groups.append((group, plan))
    if kept is not None:
        kept.planned[key] = planned
    return planned, grads
