"""The fused part of a step: the kernel calls that update a parameter group, cached until its tensors change form."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.distributed import Shards
from gradcentral.kernels import native
from gradcentral.kernels.forms import Coefficients, DeviceCoefficients, Placement, States, UpdateRule, same_objects
from gradcentral.kernels.planner import group_by_kernels
from gradcentral.layout import WeightLayout
from gradcentral.local_shard import local
from gradcentral.projection import Strength
from gradcentral.targets import Targets
from gradcentral.weight_decay import l2_of_group

__all__ = ["STATE_KEYS", "FusedOptimizer", "GroupPlan", "KernelCall", "LocalTensors"]

_ADAM_KEYS = {"momentum": "exp_avg", "squares": "exp_avg_sq", "steps": "step"}
STATE_KEYS: dict[UpdateRule, dict[str, str]] = {
    UpdateRule.SGD: {},
    UpdateRule.MOMENTUM: {"momentum": "momentum_buffer"},
    UpdateRule.ADAM: _ADAM_KEYS,
    UpdateRule.AMSGRAD: _ADAM_KEYS | {"largest_squares": "max_exp_avg_sq"},
}
"""For each field of `States`, the key under which torch keeps it in an optimizer's state."""


_PLACEMENTS = {placement.name.lower(): placement for placement in Placement}


class FusedOptimizer(Optimizer):
    """Interface that an optimizer implements so that the kernels can update its parameters."""

    targets: Targets

    def _update_rule(self, group: dict[str, Any]) -> UpdateRule:
        """Return the update rule that a group's options select."""
        raise NotImplementedError

    def _coefficients(self, group: dict[str, Any], lr: float, scale: float, strength: float) -> Coefficients:
        """Return the coefficients for a group's options, this learning rate, and the scale and strength as given."""
        raise NotImplementedError

    def _placement_of(self, group: dict[str, Any], strength: Strength) -> Placement:
        """Return the target of centering in a group: without L2 weight decay, "regularized" equals "gradient"."""
        if not isinstance(strength, Tensor) and strength == 0:
            return Placement.PLAIN
        if self.targets.placement == "regularized" and l2_of_group(self, group) == 0:
            return Placement.GRADIENT
        return _PLACEMENTS[self.targets.placement]

    def _create_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Return a parameter's state, created as torch creates it if it does not exist.

        A new momentum buffer starts as the first gradient; until that step its parameter is in ``_fresh``.
        """
        raise NotImplementedError


class LocalTensors(NamedTuple):
    """The local shards of DTensors during a step, and their gradients."""

    shards: Shards
    centered: dict[Tensor, Tensor]
    """Local gradients of the parameters whose weight vectors are split between ranks, already centered."""
    old_sums: list[Tensor]
    """Under placement "update": the local sums of their weight vectors before the step."""

    def gradient(self, p: Tensor) -> Tensor:
        """Return the local gradient that the optimizer is to use."""
        centered = self.centered.get(p)
        return local(cast("Tensor", p.grad)) if centered is None else centered


class KernelCall(NamedTuple):
    """A plan with the gradients and coefficients of this step."""

    plan: Any
    """A native or Triton plan."""
    owners: list[Tensor]
    """The parameters whose local shards the plan updates."""
    grads: list[Tensor]
    coefficients: Coefficients | DeviceCoefficients


class _PlannedCall(NamedTuple):
    plan: Any
    owners: list[Tensor]
    states: list[dict[str, Any]]
    """States of the owners, since looking them up by parameter at each step would be slow."""
    columns: Sequence[tuple[Callable[[dict[str, Any]], Tensor], list[Tensor]]]
    """For each kind of state, a function that reads it, and the tensors that the plan updates."""

    def fits(self, grads: list[Tensor], held: LocalTensors | None) -> bool:
        """Return whether the plan still updates the tensors of parameters and states, and these gradients fit it."""
        # The local shard of a DTensor may have been replaced since.
        if held is not None and not same_objects([*map(local, self.owners)], self.plan.params):
            return False
        try:
            for get, planned in self.columns:
                found = map(get, self.states)
                if not all(map(operator.is_, found if held is None else map(local, found), planned)):
                    return False
        except KeyError:  # a state has been cleared
            return False
        fits: bool = self.plan.fits(grads)
        return fits


class GroupPlan(NamedTuple):
    """The kernel calls that update a parameter group, valid while the same parameters have gradients."""

    params: list[Tensor]
    """The parameters that have gradients."""
    rule: UpdateRule
    calls: list[_PlannedCall]
    all_states: list[Any]
    """The optimizer's states when the plan was created."""
    layout: WeightLayout
    revision: int
    """The layout when the plan was created, and its revision."""

    @classmethod
    def create(
        cls,
        optimizer: FusedOptimizer,
        group: dict[str, Any],
        params: list[Tensor],
        held: LocalTensors | None,
        placement: Placement,
    ) -> GroupPlan:
        """Divide a group among kernel calls; parameters that no kernel accepts are left to torch's own step."""
        rule = optimizer._update_rule(group)
        pairs = optimizer.targets.current(optimizer).whole if held is None else held.shards.whole
        targets: dict[Tensor, Any] = dict(pairs)
        shards = [local(p) for p in params]
        grads = [_gradient(p, held) for p in params]

        def companions(kernels: ModuleType, position: int) -> list[Tensor] | None:
            """Return the gradient and state of a parameter, or None if the kernels cannot update it."""
            if kernels is native and group.get("capturable", False):
                return None
            shard, grad = shards[position], grads[position]
            states = _states_of(rule, [optimizer._create_state(group, params[position])]).map(local)
            columns = (states.momentum, states.squares, states.largest_squares)
            buffers = [column[0] for column in columns if column is not None]
            counter = None if states.steps is None else states.steps[0]
            accepted = kernels.accepts(shard, grad, buffers, counter)
            return [grad, *buffers] if accepted and len({buffer.dtype for buffer in buffers}) <= 1 else None

        calls = []
        with torch.no_grad():
            for chosen in group_by_kernels(shards, [targets.get(p) for p in params], companions)[0]:
                owners = [*chosen.select(params)]
                states = [optimizer._create_state(group, p) for p in owners]
                loops = [
                    (loop, placement if p in targets else Placement.PLAIN)
                    for p, loop in zip(owners, chosen.loops, strict=True)
                ]
                held_states = _states_of(rule, states).map(local)
                plan = chosen.kernels.Plan(rule, [*chosen.select(shards)], [*chosen.select(grads)], held_states, loops)
                columns = [(itemgetter(key), getattr(held_states, field)) for field, key in STATE_KEYS[rule].items()]
                calls.append(_PlannedCall(plan, owners, states, columns))
        layout = optimizer.targets.layout
        return cls([*params], rule, calls, [*optimizer.state.values()], layout, layout.revision)

    def kernel_calls(
        self,
        optimizer: FusedOptimizer,
        group: dict[str, Any],
        gradients: list[Tensor],
        held: LocalTensors | None,
        strength: Strength,
    ) -> list[KernelCall] | None:
        """Return the calls with these gradients of ``params``, or None if a plan no longer fits."""
        layout = optimizer.targets.layout
        if layout is not self.layout or layout.revision != self.revision:
            return None
        if not same_objects(optimizer.state.values(), self.all_states):
            return None
        calls: list[KernelCall] = []
        for call in self.calls:
            grads = gradients
            if held is not None or len(call.owners) < len(gradients):
                grads = [_gradient(p, held) for p in call.owners]
            if not call.fits(grads, held):
                return None
            coefficients = _coefficients_for(optimizer, group, call.plan, strength)
            calls.append(KernelCall(call.plan, call.owners, grads, coefficients))
        return calls


def _gradient(p: Tensor, held: LocalTensors | None) -> Tensor:
    return cast("Tensor", p.grad) if held is None else held.gradient(p)


def _states_of(rule: UpdateRule, states: Sequence[dict[str, Any]]) -> States:
    return States(**{field: [*map(itemgetter(key), states)] for field, key in STATE_KEYS[rule].items()})


def _coefficients_for(
    optimizer: FusedOptimizer, group: dict[str, Any], plan: Any, strength: Strength
) -> Coefficients | DeviceCoefficients:
    """Return the coefficients in the form that the plan's kernel takes."""
    sign = -1.0 if group["maximize"] else 1.0
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if isinstance(plan, native.Plan):
        scale = sign if grad_scale is None else sign / float(grad_scale)
        return optimizer._coefficients(group, float(group["lr"]), scale, float(strength))
    # The learning rate and the scaler's results stay on the device: reading them here would synchronize.
    on_device = strength if isinstance(strength, Tensor) else None
    coefficients = optimizer._coefficients(group, 1.0, sign, 1.0 if isinstance(strength, Tensor) else strength)
    return DeviceCoefficients(coefficients, group["lr"], grad_scale, found_inf, on_device)
