"""What the optimizers share: the layout, and the choice between the fused step and torch's own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.distributed import Division, Sharding, any_sharded, local, with_local
from gradcentral.kernels import kernels_for, native, triton
from gradcentral.kernels.compiled import restore_traced_, traced_center, traced_means
from gradcentral.kernels.forms import Coefficients, Placement, States, UpdateRule, same_objects
from gradcentral.kernels.loops import Loop
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.projection import center, subtract_means_, unit_means
from gradcentral.targets import Targets, check_placement, refuse_sparse

__all__ = ["Centralized", "States"]


class _GroupPlan(NamedTuple):
    """How a parameter group is stepped, as long as these of its parameters have gradients."""

    params: list[Tensor]
    kind: UpdateRule
    plans: list[Any]
    """Each a StepPlan, native or in Triton."""
    owners: list[list[Tensor]]
    """Of each plan's tensors the parameters, of which it has this rank's parts."""
    states: list[list[dict[str, Any]]]
    """Of each plan's parameters; looking them up by parameter is slow."""
    all_states: list[Any]
    """Of the optimizer, as they were when the plan was made."""
    all_params: list[Tensor]
    """Of the group, with gradients or without."""
    sharded: bool
    """Whether some of them are DTensors."""


class _Work(NamedTuple):
    """A plan with the gradients and coefficients of this step."""

    plan: Any
    owners: list[Tensor]
    grads: list[Tensor]
    rule: Coefficients | triton.DeviceCoefficients


class _Here(NamedTuple):
    """What this rank has of DTensors at a step."""

    division: Division
    centered: dict[Tensor, Tensor]
    """Its parts of the gradients whose weight vectors are split between ranks, centered already."""


class Centralized(Optimizer):
    """Base of `SGD`, `Adam` and `AdamW`: torch's optimizer of that name, centering inside the step.

    Args:
        params: a ``torch.nn.Module`` (all its parameters), or what torch takes: parameters, named parameters, groups.
        *args, **kwargs: torch's own arguments. ``foreach=``, ``fused=False`` and ``differentiable=True`` ask for an
            implementation of torch's own, and get it, fed with centered gradients.
        model: decides the layout when ``params`` is not the model itself.
        layout: use this layout instead (see `gradcentral.weight_layout`).
        placement: ``"gradient"`` or ``"update"`` (see `gradcentral.centralize`).

    ``p.grad`` is left as autograd left it. Dense parameters take the fused kernels, those that are not centered too: on
    the CPU of f32, f64 or bf16, on CUDA devices of f32, bf16 or f16 (where Triton is installed; step counters and a
    GradScaler's verdict stay on the device, and steps can be captured in CUDA graphs). Everything else takes torch's
    own step.

    Without a model and a layout the weight vectors are guessed from shapes (`WeightLayout.from_shapes`), with one
    warning.

    Raises:
        ValueError: an unknown placement; both model and layout; the model has no parameter in the optimizer; nothing
            is left to center.
    """

    _torchs_own: type[Optimizer]

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *args: Any,
        model: nn.Module | None = None,
        layout: WeightLayout | None = None,
        placement: str = "gradient",
        **kwargs: Any,
    ) -> None:
        check_placement(placement)
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("give the model once: as the first argument or as model=")
            model = params
            params = model.parameters()
        if model is not None and layout is not None:
            raise ValueError("give model or layout, not both: weight_layout(model, …) makes a layout of your own")
        self._plans: dict[int, _GroupPlan] = {}
        self._fresh: set[Tensor] = set()
        super().__init__(params, *args, **kwargs)
        self._placement = placement
        self._by_shape = model is None and layout is None
        if layout is None:
            layout = self._shape_layout() if model is None else weight_layout(model)
        self._follow(layout)
        self._sharding.of(self.targets.first(self))

    @property
    def placement(self) -> str:
        """``"gradient"`` or ``"update"``; fixed, like the layout, when the optimizer is made."""
        return self._placement

    @property
    def layout(self) -> WeightLayout:
        """The layout in use."""
        return self.targets.layout

    def _shape_layout(self) -> WeightLayout:
        warnings.warn(
            f"gradcentral.{type(self).__name__} was given no model: it takes every parameter of two axes or more for "
            "rows of weights, which is wrong for embeddings and transposed layers; give model=, or "
            "layout=WeightLayout.from_shapes(params) if this is meant",
            stacklevel=3,
        )
        return WeightLayout.from_shapes(self.param_groups)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show torch's arguments, and ours behind them, in help() and in editors."""
        super().__init_subclass__(**kwargs)
        torchs_own = next((base for base in cls.__mro__ if base.__module__.startswith("torch.optim.")), Optimizer)
        if torchs_own is Optimizer:
            return
        cls._torchs_own = torchs_own
        if "__init__" in cls.__dict__:  # a subclass with arguments of its own
            own = [p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"]
            cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
            return
        ours = inspect.signature(Centralized.__init__).parameters
        signature = inspect.signature(torchs_own.__init__)  # type: ignore[misc]
        torchs = [parameter for name, parameter in signature.parameters.items() if name != "self"]
        extra = [ours[name] for name in ("model", "layout", "placement")]
        cls.__signature__ = signature.replace(parameters=[*torchs, *extra])  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three attributes only; a copy that lost its layout would stop centering in silence.
        own = {"_placement": self._placement, "_by_shape": self._by_shape, "_copied_layout": self.layout}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch comes here with state and groups alone when a checkpoint is loaded: then the layout stays.
        copied = {name: value for name, value in state.items() if name != "_copied_layout"}
        super().__setstate__(copied)
        self._plans = {}
        self._fresh = set()
        if "_copied_layout" in state:
            self._follow(state["_copied_layout"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Layers that the model has got since are looked up in it."""
        super().add_param_group(param_group)
        if getattr(self, "_by_shape", False):
            self._follow(WeightLayout.from_shapes(self.param_groups))

    def _follow(self, layout: WeightLayout) -> None:
        self.targets = Targets(layout, self._placement)
        self._sharding = Sharding(layout)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as torch's, with Gradient Centralization. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fuse = not torch.compiler.is_compiling()
        if not fuse and self._can_be_traced():
            self._refuse_sparse()
            self._traced_step()
            return loss
        self.targets.check(self)
        found_inf = getattr(self, "found_inf", None)
        # Before any state is made. A device's verdict is left to the kernels there: looking would wait for it.
        if found_inf is not None and fuse and found_inf.is_cpu and found_inf.item():
            return loss
        here, sums = None, []
        if self._any_sharded():
            with torch.no_grad():
                here = self._here()
                sums = here.division.sums() if self.placement == "update" else []
        work: list[_Work] = []
        wanted = served = 0
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            wanted += len(params)
            if fuse and _may_fuse(group):
                work += self._fused_work(index, group, params, here)
        # A first step that the device skips would pass for the first all the same: once, it is worth waiting for.
        if found_inf is not None:
            by_host = self._fresh or any(isinstance(planned.plan, native.StepPlan) for planned in work)
            if by_host and found_inf.item():
                return loss
        for planned in work:
            served += len(planned.owners)
        if served < wanted:
            self._refuse_sparse()  # before anything has moved
        for plan, owners, grads, rule in work:
            plan.run(grads, rule, [p in self._fresh for p in owners] if self._fresh else [])
        self._fresh.clear()
        if served < wanted:
            self._torchs_step([p for planned in work for p in planned.owners], here)
        if here is not None and self.placement == "update":
            with torch.no_grad():
                here.division.restore_(sums)
        return loss

    # What a subclass says of its rule.

    def _kind(self, group: dict[str, Any]) -> UpdateRule:
        """The kernel for a group's options."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any], lr: float) -> Coefficients:
        """The kernel's coefficients for a group's options and this learning rate."""
        raise NotImplementedError

    def _make_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """A parameter's state, made as torch makes it where there is none.

        A momentum buffer starts as the direction of the first step: its parameter is noted in ``_fresh`` until then.
        """
        raise NotImplementedError

    def _columns(self, group: dict[str, Any], states: list[dict[str, Any]]) -> States:
        """The state tensors of some parameters."""
        raise NotImplementedError

    # The two ways to step.

    def _any_sharded(self) -> bool:
        """Whether parameters are DTensors; looked up in the plans, where they are those of last time."""
        plans = self._plans
        for index, group in enumerate(self.param_groups):
            planned, params = plans.get(index), group["params"]
            known = planned is not None and same_objects(params, planned.all_params)
            if planned.sharded if known and planned is not None else any_sharded(params):
                return True
        return False

    def _here(self) -> _Here:
        """What this rank has, where parameters are DTensors."""
        if self.defaults.get("differentiable", False):
            raise ValueError("differentiable=True can't be used with DTensors: what is centered is a rank's part alone")
        targets = self.targets.of(self)
        division = self._sharding.of(targets) or Division(targets, [], self.layout.names)
        division.place_gradients(p for group in self.param_groups for p in group["params"])
        return _Here(division, division.centered_gradients() if self.placement == "gradient" else {})

    def _fused_work(self, index: int, group: dict[str, Any], params: list[Tensor], here: _Here | None) -> list[_Work]:
        """What the kernels can serve of a group's parameters that have gradients."""
        kind, planned = self._kind(group), self._plans.get(index)
        work = None
        if planned is not None and planned.kind == kind and same_objects(params, planned.params):
            work = self._work(group, planned, here)
        if work is None:
            planned = self._plans[index] = self._plan(kind, group, params, here)
            work = self._work(group, planned, here)
            assert work is not None, "a plan fits the tensors it was made for"
        return work

    def _work(self, group: dict[str, Any], planned: _GroupPlan, here: _Here | None) -> list[_Work] | None:
        """Each of a group's plans with the gradients and coefficients of now, or None where one no longer fits."""
        if not same_objects([*self.state.values()], planned.all_states):
            return None
        work: list[_Work] = []
        for plan, owners, states in zip(planned.plans, planned.owners, planned.states, strict=True):
            # A DTensor may have got another part in the place of the one that was planned for.
            if here is not None and not same_objects([*map(local, owners)], plan.params):
                return None
            grads = [cast("Tensor", p.grad) if here is None else _gradient(p, here) for p in owners]
            try:
                columns = self._columns(group, states)
                fits = plan.fits(grads, columns if here is None else _parts(columns))
            except KeyError:  # somebody has emptied a state
                return None
            if not fits:
                return None
            work.append(_Work(plan, owners, grads, self._rule_for(plan, group)))
        return work

    def _rule_for(self, plan: Any, group: dict[str, Any]) -> Coefficients | triton.DeviceCoefficients:
        """The coefficients as the plan's kernel takes them."""
        sign = -1.0 if group["maximize"] else 1.0
        if isinstance(plan, native.StepPlan):
            rule = self._rule(group, float(group["lr"]))
            rule.scale = sign / _grad_scale(self)
            return rule
        rule = self._rule(group, 1.0)
        rule.scale = sign
        return triton.DeviceCoefficients(
            rule, group["lr"], getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )

    def _plan(self, kind: UpdateRule, group: dict[str, Any], params: list[Tensor], here: _Here | None) -> _GroupPlan:
        """Divide a group among plans, one for each device and dtype; what none takes is left to torch's own step."""
        targets = dict(self.targets.of(self) if here is None else here.division.whole)
        candidates: dict[Any, list[tuple[Tensor, tuple[Loop, Placement]]]] = {}
        with torch.no_grad():
            for p in params:
                vectors, kernels = targets.get(p), kernels_for(local(p))
                loop = None if kernels is None else kernels.loop_of(local(p), vectors)
                if loop is None or (kernels is native and group.get("capturable", False)):
                    continue
                tensors = self._tensors_of(kernels, group, p, here)
                if tensors is not None:
                    placement = Placement.PLAIN if vectors is None else Placement[self.placement.upper()]
                    form = (kernels, tensors[0].device, *(tensor.dtype for tensor in tensors))
                    candidates.setdefault(form, []).append((p, (loop, placement)))
        plans, owners, states = [], [], []
        for (kernels, *_), chosen in candidates.items():
            owners.append([p for p, _ in chosen])
            states.append([self._make_state(group, p) for p in owners[-1]])
            grads = [_gradient(p, here) for p in owners[-1]]
            columns = _parts(self._columns(group, states[-1]))
            parts = [*map(local, owners[-1])]
            plans.append(kernels.StepPlan(kind, parts, grads, columns, [loop for _, loop in chosen]))
        everything = [*group["params"]]
        return _GroupPlan(
            params, kind, plans, owners, states, [*self.state.values()], everything, any_sharded(everything)
        )

    def _tensors_of(self, kernels: Any, group: dict[str, Any], p: Tensor, here: _Here | None) -> list[Tensor] | None:
        """A parameter, its gradient and its state, this rank's parts, where the kernels can step it with them."""
        *buffers, steps = _parts(self._columns(group, [self._make_state(group, p)]))
        part, gradient = local(p), _gradient(p, here)
        states = [column[0] for column in buffers if column is not None]
        serves = (
            kernels.accepts_gradient(part, gradient)
            and all(kernels.accepts_state(part, state) for state in states)
            and len({state.dtype for state in states}) <= 1
            and (steps is None or kernels.accepts_counter(steps[0], part.device))
        )
        return [part, gradient, *states] if serves else None

    def _refuse_sparse(self) -> None:
        if self._placement == "gradient":
            for p, _ in self.targets.of(self):
                if p.grad is not None:
                    refuse_sparse(p.grad, p, self.layout)

    def _torchs_step(self, served: list[Tensor], here: _Here | None) -> None:
        """The reference path: torch's own step for what is not served yet, fed with centered gradients."""
        done = set(served)
        targets = self.targets.of(self) if here is None else here.division.whole
        targets = [(p, vectors) for p, vectors in targets if p.grad is not None and p not in done]
        gradients = {p: p.grad for p in served}
        kept = []
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable", False))):
            try:
                for p in served:
                    p.grad = None
                for p, held in ({} if here is None else here.centered).items():
                    if p not in done:
                        gradients[p] = p.grad
                        p.grad = with_local(cast("Tensor", p.grad), held)
                for p, vectors in targets:
                    if self.placement == "update":
                        kept.append((p, vectors, unit_means(local(p), vectors)))
                        continue
                    gradient = cast("Tensor", p.grad)
                    gradients[p] = gradient
                    p.grad = with_local(gradient, center(local(gradient), vectors))
                _plain_step(self._torchs_own)(self)
            finally:
                for p, gradient_or_none in gradients.items():
                    p.grad = gradient_or_none
            for p, vectors, means in kept:
                subtract_means_(local(p), unit_means(local(p), vectors) - means, vectors)

    def _can_be_traced(self) -> bool:
        """Whether the operators serve: they are not differentiable, and know nothing of other ranks."""
        sharded = any(any_sharded(group["params"]) for group in self.param_groups)
        return not sharded and not self.defaults.get("differentiable", False)

    @torch.no_grad()
    def _traced_step(self) -> None:
        """The step as ``torch.compile`` traces it: torch's own, between two operators that center.

        Replacing ``p.grad`` would break the graph: it gets the centered values and then its own again, of which the
        compiled code keeps nothing. (Inductor loses the second write where an operator has centered in place.)
        """
        targets = [(p, vectors) for p, vectors in self.targets.of(self) if p.grad is not None]
        if self._placement == "update":
            means = traced_means(targets)
            _plain_step(self._torchs_own)(self)
            restore_traced_(targets, means)
            return
        pairs = [(cast("Tensor", p.grad), vectors) for p, vectors in targets]
        raw = [gradient.clone() for gradient, _ in pairs]
        for (gradient, _), centered in zip(pairs, traced_center(pairs), strict=True):
            gradient.copy_(centered)
        _plain_step(self._torchs_own)(self)
        for (gradient, _), old in zip(pairs, raw, strict=True):
            gradient.copy_(old)


def _gradient(p: Tensor, here: _Here | None) -> Tensor:
    """What a plan is to step with: this rank's part, centered already if that took other ranks."""
    held = None if here is None else here.centered.get(p)
    return local(cast("Tensor", p.grad)) if held is None else held


def _parts(columns: States) -> States:
    """The parts of state tensors that this rank holds."""
    return columns.map(local)


def _may_fuse(group: dict[str, Any]) -> bool:
    """Whether nothing in a group's options asks for an implementation of torch's own."""
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
    )


def _grad_scale(optimizer: Optimizer) -> float:
    """What a GradScaler left for a fused optimizer to divide the gradients by."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _plain_step(torchs_own: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """torch's step without what torch wraps around it: our step has run the hooks and set the grad mode already.

    The wrapper that sets the grad mode breaks the graph of ``torch.compile`` twice.
    """
    step: Any = torchs_own.step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return cast("Callable[[Optimizer], Any]", step)
