"""Base class of `SGD`, `Adam` and `AdamW`: torch's optimizer of the same name, with centering inside its step."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from gradcentral.groups import OPTION
from gradcentral.kernels import native
from gradcentral.kernels.compiled import TracedCentering
from gradcentral.kernels.forms import same_objects
from gradcentral.kernels.planner import dispatch_is_observed
from gradcentral.layout import WeightLayout
from gradcentral.local_shard import any_sharded, local, overlaps_itself, with_local
from gradcentral.optim.compiled import StepPlans, TracedOptimizer, may_fuse
from gradcentral.optim.fused import GroupPlan, KernelCall, LocalTensors
from gradcentral.projection import Strength, center_regularized, checked_strength, restore_means_, unit_means
from gradcentral.targets import Targets, check_placement, layout_to_use, log_attached, refuse_sparse
from gradcentral.weight_decay import L2, l2_of

__all__ = ["CentralizedOptimizer"]


class CentralizedOptimizer(TracedOptimizer):
    """Base class of `SGD`, `Adam` and `AdamW`: torch's optimizer of the same name, with centering inside its step.

    Args:
        params: a ``torch.nn.Module`` (all its parameters), or what torch takes: parameters, named parameters, groups.
        args, kwargs: torch's own arguments. ``foreach=``, ``fused=False`` and ``differentiable=True`` select
            torch's own implementation, which receives centered gradients.
        model: determines the layout if ``params`` is not the model itself.
        layout: use this layout instead (see `gradcentral.weight_layout`).
        placement: ``"gradient"``, ``"regularized"`` or ``"update"`` (see `gradcentral.centralize`).
        strength: from 0 (off) to 1 (GC); the attribute ``strength`` may change while training. A parameter group with
            ``"centralize": False`` is left out; ``"centralize": 0.5`` replaces the strength for its parameters.

    ``p.grad`` is unchanged. The fused kernels update dense parameters, including those that are not centered: on the
    CPU in float32, float64 or bfloat16; on CUDA devices in float32, bfloat16 or float16, if Triton is installed (step
    counters and a GradScaler's ``found_inf`` stay on the device, and steps can be captured in CUDA graphs). torch's own
    step updates everything else.

    Without a model and a layout, the models that hold the parameters are searched (`WeightLayout.from_parameters`).

    Attributes:
        targets: the parameters that are centered.

    Raises:
        ValueError: an unknown placement; a strength that is not between 0 and 1; both model and layout; none of the
            model's parameters is in the optimizer; nothing is left to center.
    """

    _torch_optimizer: type[Optimizer]

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *args: Any,
        model: nn.Module | None = None,
        layout: WeightLayout | None = None,
        placement: str = "gradient",
        strength: Strength = 1.0,
        **kwargs: Any,
    ) -> None:
        check_placement(placement)
        checked_strength(strength)
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("pass the model once: as the first argument or as model=")
            model = params
            params = model.parameters()
        self._search = model is None and layout is None
        chosen = None if self._search else layout_to_use(model, layout)
        self._plans: dict[tuple[object, ...], GroupPlan] = {}
        self._compiled: dict[int, StepPlans] = {}
        self._fresh: set[Tensor] = set()
        super().__init__(params, *args, **kwargs)
        layout = WeightLayout.from_parameters(self.param_groups) if chosen is None else chosen
        self.targets = Targets(layout, placement, strength)
        shards = self.targets.attach(self)
        log_attached(f"gradcentral.{type(self).__name__}", len(shards.pairs), placement)

    @property
    def placement(self) -> str:
        """``"gradient"``, ``"regularized"`` or ``"update"``; fixed, like the layout, when the optimizer is created."""
        return self.targets.placement

    @property
    def strength(self) -> Strength:
        """s of P_s = I − s·eeᵀ, from 0 (off) to 1 (GC). Assign to it to change it from the next step on.

        Assigning to it raises a ValueError if it is not between 0 and 1. ``state_dict`` does not contain it.
        """
        return self.targets.strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        self.targets.strength = strength

    @property
    def layout(self) -> WeightLayout:
        """The layout in use."""
        return self.targets.layout

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show torch's arguments, followed by ours, in help() and in editors."""
        super().__init_subclass__(**kwargs)
        base = next((base for base in cls.__mro__ if base.__module__.startswith("torch.optim.")), Optimizer)
        if base is Optimizer:
            return
        cls._torch_optimizer = base
        if "__init__" in cls.__dict__:  # a user's subclass with arguments of its own
            own = [p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"]
            cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
            return
        ours = inspect.signature(CentralizedOptimizer.__init__).parameters
        signature = inspect.signature(base.__init__)  # type: ignore[misc]
        inherited = [parameter for name, parameter in signature.parameters.items() if name != "self"]
        extra = [ours[name] for name in ("model", "layout", "placement", "strength")]
        cls.__signature__ = signature.replace(parameters=[*inherited, *extra])  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only three attributes; a copy without its layout would stop centering without an error.
        own = {"_search": self._search, "_copied": (self.layout, self.placement, self.strength)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # When a checkpoint is loaded, torch calls this with state and groups alone, and the layout stays.
        super().__setstate__({name: value for name, value in state.items() if name != "_copied"})
        self._plans = {}
        self._compiled = {}
        self._fresh = set()
        if "_copied" in state:
            self.targets = Targets(*state["_copied"])
        elif hasattr(self, "targets"):
            self.targets.follow_groups(self)  # which writes the settings of groups back that a checkpoint lacks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch. Layers added to the model since are looked up in it."""
        super().add_param_group(param_group)
        created = hasattr(self, "targets")
        if created and self._search and not all(map(self.layout.in_model, self.param_groups[-1]["params"])):
            self.targets = Targets(WeightLayout.from_parameters(self.param_groups), self.placement, self.strength)
            self.targets.attach(self)

    # Unlike the steps of torch.optim, this one refuses what it cannot update and plans the kernel calls of all groups
    # before it changes anything, so that an error leaves the weights unchanged.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, as torch's optimizer does, with Gradient Centralization. Returns the closure's loss."""
        if torch.compiler.is_compiling() and self.targets.share_a_strength(self):
            return self._eager_step(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        traced = torch.compiler.is_compiling()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if traced and _COMPILES_KERNELS and self._can_fuse(found_inf is not None):
            self._fused_step()
            return loss
        if traced and (found_inf is None or self._torch_reads_found_inf) and self._can_be_traced():
            self._refuse_sparse()
            self._traced_step()
            return loss
        self.targets.check(self)
        # Checked before any state is created. On a CUDA device the kernels read found_inf themselves: reading it here
        # would synchronize with the device.
        if found_inf is not None and not traced and found_inf.is_cpu and found_inf.item():
            return loss
        held = self._local_tensors() if any(any_sharded(group["params"]) for group in self.param_groups) else None
        calls, complete = ([], False) if traced or dispatch_is_observed() else self._kernel_calls(held)
        if found_inf is not None and self._needs_found_inf(calls, complete) and found_inf.item():
            return loss
        if not complete:  # first, because torch may raise an error
            self._refuse_sparse()
            self._rest_by_torch([p for call in calls for p in call.owners], held)
        for plan, owners, grads, coefficients in calls:
            plan.run(grads, coefficients, [p in self._fresh for p in owners] if self._fresh else [])
        self._fresh.clear()
        if held is not None and self.placement == "update":
            with torch.no_grad():
                held.shards.restore_split_means_(held.old_sums, self.targets.strengths(self))
        return loss

    _eager_step = _disable_dynamo(_step)

    def _needs_found_inf(self, calls: list[KernelCall], complete: bool) -> bool:
        """Return whether the host must read found_inf: code that cannot read it runs, or a momentum buffer is new."""
        # A skipped first step would still count as the first, so synchronize once to find out.
        by_torch = not complete and not self._torch_reads_found_inf
        return bool(self._fresh) or by_torch or any(isinstance(call.plan, native.Plan) for call in calls)

    @torch.no_grad()
    def _local_tensors(self) -> LocalTensors:
        if self.defaults.get("differentiable", False):
            raise ValueError(
                "differentiable=True cannot be used with DTensors, of which only the local shard is centered: set "
                "differentiable=False"
            )
        shards = self.targets.current(self)
        shards.place_gradients(p for group in self.param_groups for p in group["params"])
        if self.placement == "update":
            return LocalTensors(shards, {}, shards.split_sums())
        return LocalTensors(shards, shards.centered_split_gradients(self._l2(), self.targets.strengths(self)), [])

    def _l2(self) -> L2 | None:
        """Return the weight decay that is centered together with the gradients."""
        return l2_of(self) if self.placement == "regularized" else None

    def _kernel_calls(self, held: LocalTensors | None) -> tuple[list[KernelCall], bool]:
        """Return the kernel calls of this step, and whether they update every parameter that has a gradient."""
        calls: list[KernelCall] = []
        wanted = 0
        for index, group in enumerate(self.param_groups):
            params, grads = group["params"], [*map(_grad_of, group["params"])]
            if any(map(operator.is_, grads, repeat(None))):
                params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
                grads = [grad for grad in grads if grad is not None]
            wanted += len(params)
            if may_fuse(group):
                calls += self._calls_of_group(index, group, params, grads, held)
        return calls, wanted == sum(len(call.owners) for call in calls)

    def _calls_of_group(
        self,
        index: int,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        held: LocalTensors | None,
    ) -> list[KernelCall]:
        strength = self.targets.strength_of(group)
        placement = self._placement_of(group, strength)
        key = index, group.get(OPTION) is False, placement
        plan, calls = self._plans.get(key), None
        if plan is not None and plan.rule == self._update_rule(group) and same_objects(params, plan.params):
            calls = plan.kernel_calls(self, group, grads, held, strength)
        if calls is None:
            plan = self._plans[key] = GroupPlan.create(self, group, params, held, placement)
            calls = plan.kernel_calls(self, group, grads, held, strength)
            assert calls is not None, "a plan must fit the tensors it was created for"
        return calls

    def _refuse_sparse(self) -> None:
        """Refuse the sparse gradients that cannot be centered, or that torch's step would refuse halfway."""
        if self.placement != "update":
            for p, _ in self.targets.current(self).pairs:
                if p.grad is not None:
                    refuse_sparse(p.grad, p, self.layout)
        for group in self.param_groups:
            sparse = [p for p in group["params"] if p.grad is not None and p.grad.layout != torch.strided]
            if sparse and (remedy := self._remedy_for_sparse(group)):
                name = self.layout.names.get(sparse[0], f"a parameter of shape {tuple(sparse[0].shape)}")
                raise RuntimeError(
                    f"{name} has a sparse gradient, which {type(self).__name__} cannot use with these options: make "
                    f"the gradient dense (sparse=False), or {remedy}"
                )

    def _remedy_for_sparse(self, group: dict[str, Any]) -> str:
        """Return what to do about a sparse gradient in this group; empty if torch's step accepts it."""
        raise NotImplementedError

    _torch_reads_found_inf = True
    """Whether `_torch_step` does nothing if the ``found_inf`` of a GradScaler is not 0."""

    def _torch_step(self) -> None:
        """Take torch's own step with the current ``p.grad``."""
        _unwrapped_step(self._torch_optimizer)(self)

    def _rest_by_torch(self, updated: list[Tensor], held: LocalTensors | None) -> None:
        """Update all other parameters with torch's own step, centered by the reference path."""
        done = set(updated)
        whole = self.targets.current(self).whole if held is None else held.shards.whole
        targets = [(p, vectors) for p, vectors in whole if p.grad is not None and p not in done]
        replaced = {p: p.grad for p in updated}
        means = []
        l2, strengths = self._l2(), self.targets.strengths(self)
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable", False))):
            try:
                for p in updated:
                    p.grad = None
                for p, centered in ({} if held is None else held.centered).items():
                    if p not in done:
                        replaced[p] = p.grad
                        p.grad = with_local(cast("Tensor", p.grad), centered)
                for p, vectors in targets:
                    if self.placement == "update":
                        means.append(unit_means(local(p), vectors))
                        continue
                    gradient = cast("Tensor", p.grad)
                    replaced[p] = gradient
                    factor = 0.0 if l2 is None else l2.of(p)
                    centered = center_regularized(local(gradient), local(p), factor, vectors, strengths.of(p))
                    p.grad = with_local(gradient, centered)
                for p in self._fresh.difference(done):
                    self.state[p]["momentum_buffer"] = None  # torch starts it with the gradient itself
                self._torch_step()
            finally:
                for p, gradient_or_none in replaced.items():
                    p.grad = gradient_or_none
            for (p, vectors), old in zip(targets if means else [], means, strict=True):
                restore_means_(local(p), old, vectors, strengths.of(p))

    def _can_be_traced(self) -> bool:
        """Return whether the custom operators apply: they are not differentiable and do not communicate.

        Nor can a gradient whose elements share memory be overwritten.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if any_sharded(params) or self.defaults.get("differentiable", False):
            return False
        grads = [p.grad for p in params if p.grad is not None]
        return not any(g.layout == torch.strided and overlaps_itself(g) for g in grads)

    @torch.no_grad()
    def _traced_step(self) -> None:
        """Take the step that ``torch.compile`` traces where the kernels do not apply.

        It is torch's own step, with operators that center before or around it.

        Replacing ``p.grad`` would break the graph, so it is overwritten with the centered values and later with the
        original ones, which the compiled code optimizes away. Two pitfalls of Inductor: it drops the second write if an
        operator centers ``p.grad`` itself in place, and it merges two clones of one tensor, so that centering one would
        center the other. Therefore a copy is centered, and the original is kept as −(−g).
        """
        traced = TracedCentering()
        targets = [(p, vectors) for p, vectors in self.targets.current(self).whole if p.grad is not None]
        parts = self.targets.strengths(self).divide(targets)
        if self.placement == "update":
            means = [traced.means(part) for _, part in parts]
            self._torch_step()
            for (strength, part), old in zip(parts, means, strict=True):
                traced.restore_(part, old, strength)
            return
        grads = [cast("Tensor", p.grad) for p, _ in targets]
        negated, centered = [-g for g in grads], [g.clone() for g in grads]
        copies = {p: g for (p, _), g in zip(targets, centered, strict=True)}
        l2 = self._l2()
        for strength, part in parts:
            pairs = [(copies[p], vectors) for p, vectors in part]
            if l2 is None or not l2.factors:
                traced.center_all_(pairs, strength)
            else:
                params = [p for p, _ in part]
                factors = [l2.factors.get(p, 0.0) for p in params]
                traced.center_regularized_(pairs, params, factors, l2.grad_scale, strength)
        for gradient, value in zip(grads, centered, strict=True):
            gradient.copy_(value)
        self._torch_step()
        for gradient, value in zip(grads, negated, strict=True):
            gradient.copy_(-value)


_grad_of = operator.attrgetter("grad")
# Older versions were not tested with the operator of a whole step, and Dynamo of torch 2.8 cannot trace it.
_COMPILES_KERNELS = torch.__version__ >= "2.13"


def _unwrapped_step(torch_optimizer: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """Return torch's step without its wrappers: our step has already run the hooks and set the grad mode.

    The wrapper that sets the grad mode breaks the graph of ``torch.compile`` twice.
    """
    step: Any = torch_optimizer.step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return cast("Callable[[Optimizer], Any]", step)
