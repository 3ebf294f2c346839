"""The hooks by which a handle centers in the steps of one optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.distributed import Shards
from gradcentral.gradients import center_gradients_, eager_or_traced
from gradcentral.kernels import Centering, Means
from gradcentral.layout import WeightLayout
from gradcentral.local_shard import local
from gradcentral.never_stepped import watch_for_steps
from gradcentral.projection import Pair, Strength
from gradcentral.step_hooks import HookedCall, closure_of, refuse_differentiable, replace_closure
from gradcentral.strengths import Strengths
from gradcentral.targets import Targets
from gradcentral.weight_decay import l2_of

__all__ = ["Attachment", "attachments_of"]


class _BeforeStep(NamedTuple):
    """State that placement "update" keeps during a step: the means of the weight vectors, and the strengths."""

    shards: Shards
    strengths: Strengths
    parts: list[tuple[Strength, list[Pair], Means]]
    """The tensors with each strength, and the means of their weight vectors."""
    split_sums: list[Tensor]


class _Early(NamedTuple):
    """A gradient that was centered before the optimizer called a closure."""

    gradient: Tensor
    version: int
    original: Tensor

    def undo_(self) -> None:
        """Write the original values back, unless the optimizer has changed the gradient in the meantime."""
        if local(self.gradient)._version == self.version:
            with torch.no_grad():
                self.gradient.copy_(self.original)


class Attachment:
    """The centering that a handle has attached to one optimizer.

    Attributes:
        handle: the handle.
        targets: the parameters that are centered; see `Targets`.
        stepped: whether the optimizer's step has been called.
    """

    def __init__(self, handle: object, layout: WeightLayout, placement: str, strength: Strength) -> None:
        self.handle = handle
        self.targets = Targets(layout, placement, strength)
        self.stepped = False
        self._hooks: list[Any] = []
        self._centering = Centering()
        self._before: _BeforeStep | None = None
        self._early: list[_Early] = []
        self._found_gradients = True  # when this step was last centered
        self._closure_calls: int | None = None  # in this step; None without a closure
        self._calls_closures = False  # whether the optimizer has called one in an earlier step

    @property
    def active(self) -> bool:
        """Whether the optimizer exists and has the hooks."""
        return any(hook.id in (hook.hooks_dict_ref() or ()) for hook in self._hooks)

    @property
    def paused(self) -> bool:
        """Whether steps currently do not center."""
        return self.targets.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self.targets.paused = paused

    @property
    def strength(self) -> Strength:
        """s of P_s = I − s·eeᵀ."""
        return self.targets.strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        self.targets.strength = strength

    def register(self, optimizer: Optimizer) -> None:
        """Register the hooks."""
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):  # missing where __init__ never called torch's
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        watch_for_steps(self, optimizer, (p for p, _ in self.targets.current(optimizer).pairs))

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._before, self._early = None, []
        self.stepped = True  # no warning that it never stepped

    def _after_load(self, optimizer: Optimizer) -> None:
        self.targets.follow_groups(optimizer)  # which writes the settings of groups back that a checkpoint lacks

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCall | None:
        self.stepped = True
        self._before, self._early = None, []
        self._found_gradients, self._closure_calls = True, None
        refuse_differentiable(optimizer)
        self.targets.check(optimizer)
        if self.targets.paused:
            return None
        closure = closure_of(args, kwargs)
        if self.targets.placement == "update":
            self._keep_means(optimizer, closure)
            return None
        if closure is None:
            self._center(optimizer)
            return None
        if not self._calls_closures:
            # Some optimizers accept a closure and do not call it, so center the gradients that exist now. If it is
            # called after all, it receives them as they were: it may add to them and clip the sum (Lightning).
            self._center_early(optimizer)
        self._closure_calls = 0
        return replace_closure(args, kwargs, self._centering_closure(optimizer, closure))

    def _keep_means(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        shards = self.targets.current(optimizer)
        if closure is not None and self.targets.layout.pending:
            raise RuntimeError(
                "lazy parameters receive their values inside this step's closure, so there are no means to keep yet: "
                "run one forward pass of the model before the first step"
            )
        with torch.no_grad():
            # Frozen parameters do not change; their types, such as float8, may not even have a mean.
            whole = [(p, vectors) for p, vectors in shards.whole if p.requires_grad or p.grad is not None]
            strengths, parts = self.targets.strengths(optimizer), []
            for position, (strength, members) in enumerate(strengths.divide(whole)):
                pairs = [(local(p), vectors) for p, vectors in members]
                parts.append((strength, pairs, eager_or_traced(self._centering.part(position)).means(pairs)))
            self._before = _BeforeStep(shards, strengths, parts, shards.split_sums())

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (before := self._before) is not None:
            with torch.no_grad():
                for position, (strength, pairs, means) in enumerate(before.parts):
                    eager_or_traced(self._centering.part(position)).restore_(pairs, means, strength)
                before.shards.restore_split_means_(before.split_sums, before.strengths)
        self._before, self._early = None, []
        if not torch.compiler.is_compiling():
            self._check_centered(optimizer)

    def _check_centered(self, optimizer: Optimizer) -> None:
        """Raise if this step used gradients that did not exist when its hooks could center them."""
        missed = self._closure_calls == 0 and self._calls_closures
        if not self._found_gradients:
            missed |= any(p.grad is not None for p, _ in self.targets.current(optimizer).pairs)
        self._calls_closures |= bool(self._closure_calls)
        if missed:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() used gradients that were not centered, because they were computed "
                "inside it and not by a closure that it called: call backward() before step() or in the closure, or "
                "use placement='update', which does not depend on when gradients are computed"
            )

    def _centering_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        # The gradients appear inside step(), each time it calls the closure.
        @functools.wraps(closure)
        def centering_closure() -> Any:
            for early in self._early:
                early.undo_()
            self._early = []
            loss = closure()
            self._closure_calls = (self._closure_calls or 0) + 1
            self._center(optimizer)
            return loss

        return centering_closure

    def _center_early(self, optimizer: Optimizer) -> None:
        pairs = self.targets.current(optimizer).pairs
        originals = [(p, p.grad.detach().clone()) for p, _ in pairs if p.grad is not None]
        self._center(optimizer)
        centered = [(p.grad, original) for p, original in originals if p.grad is not None]
        self._early = [_Early(gradient, local(gradient)._version, original) for gradient, original in centered]

    def _center(self, optimizer: Optimizer) -> None:
        shards = self.targets.current(optimizer)
        l2 = l2_of(optimizer) if self.targets.placement == "regularized" else None
        center_gradients_(self.targets.layout, shards, self._centering, l2, self.targets.strengths(optimizer))
        if not torch.compiler.is_compiling():
            self._found_gradients = any(p.grad is not None for p, _ in shards.pairs)


def attachments_of(optimizer: Optimizer) -> list[Attachment]:
    """Return what handles have attached to an optimizer and not removed."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, Attachment)]
