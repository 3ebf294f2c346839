"""Hooks on the gradients of a model, which center each gradient when `backward()` computes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradcentral.gradients import refuse_empty, refuse_per_sample
from gradcentral.layout import WeightLayout
from gradcentral.layout.rules import LAZY
from gradcentral.local_shard import is_sharded
from gradcentral.projection import Strength, center
from gradcentral.targets import refuse_sparse

__all__ = ["GradientHooks", "hooks_of", "parameters_to_hook"]


class GradientHooks:
    """The hooks of a handle on the parameters of a layout, and on its models, whose changes they follow.

    Φ is linear, so that centering what a backward pass adds to a gradient, before accumulation, reduction between ranks
    and unscaling, has the same result as centering the gradient afterwards.

    Attributes:
        handle: the handle.
        layout: the weight vectors of the model's parameters.
        strength: s of P_s = I − s·eeᵀ.
        paused: whether backward passes currently do not center.
    """

    def __init__(self, handle: object, layout: WeightLayout, strength: Strength = 1.0) -> None:
        self.handle = handle
        self.layout = layout
        self.strength = strength
        self.paused = False
        self._hooks: dict[Tensor, Any] = {}
        self._on_models: list[Any] = []
        self._revision = -1
        self._has_fired = False
        self._has_warned = False
        self._without_gradient: set[Tensor] = set()  # when the hooks were registered

    @property
    def active(self) -> bool:
        """Whether some of the hooks are registered."""
        return any(_is_registered(hook) for hook in self._hooks.values())

    def register(self) -> None:
        """Register the hooks."""
        refuse_empty(self.layout)
        self.update()
        self._without_gradient = {p for p in self.layout if p.grad is None}
        for model in self.layout.models():
            if isinstance(model, torch.jit.ScriptModule):
                continue  # it takes no such hooks, and cannot change
            _remove_copied_hooks(model)
            self._on_models.append(model.register_forward_hook(_AfterForward(self)))

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in (*self._hooks.values(), *self._on_models):
            hook.remove()
        self._hooks.clear()
        self._on_models.clear()

    def update(self) -> None:
        """Follow changes of the model: lazy parameters, and layers that were added, removed, replaced or pruned.

        Raises:
            ValueError: the model has been sharded, or converted by Opacus.
        """
        layout = self.layout
        layout.follow()
        if layout.pending:
            layout.refresh()
        if layout.revision == self._revision:
            return
        self._refuse()
        wanted = parameters_to_hook(layout)
        for p in self._hooks.keys() - {*wanted}:
            self._hooks.pop(p).remove()
        for p in wanted:
            if not _is_registered(self._hooks.get(p)):
                self._hooks[p] = _register(p, _GradientHook(self, p))
        if self._revision >= 0 and not wanted:
            warnings.warn(
                f"nothing is left to center in backward: {layout.summary()}; call "
                "gradcentral.centralize_in_backward(model) after everything that replaces parameters",
                stacklevel=2,
            )
        self._revision = layout.revision

    def _refuse(self) -> None:
        """Refuse parameters whose gradients the hooks cannot center."""
        sharded = next((name for p, name in self.layout.names.items() if is_sharded(p)), None)
        if sharded is None and any(_is_fsdp2(module) for model in self.layout.models() for module in model.modules()):
            sharded = "the model"  # whose parameters are gathered now
        if sharded is not None:
            raise ValueError(
                f"{sharded} is sharded (FSDP2, tensor parallelism), so hooks on gradients do not run, or receive parts "
                "of them: attach to the optimizer instead, with gradcentral.centralize(optimizer, model)"
            )
        for p in self.layout:
            refuse_per_sample(p, self.layout)

    def centered(self, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        """Return the centered gradient; None to leave it unchanged."""
        self._has_fired = True
        if parameter not in self.layout and self.layout.pending:
            self.update()
        if self.paused or parameter not in self.layout:
            return None
        refuse_sparse(gradient, parameter, self.layout)
        refuse_per_sample(parameter, self.layout)
        # Autograd may use this gradient elsewhere, so it is not changed in place.
        return center(gradient, self.layout[parameter], self.strength)

    def after_forward(self) -> None:
        """Follow changes of the model, and warn once if gradients are computed without the hooks."""
        self.update()
        if self._has_fired or self._has_warned or not torch.is_grad_enabled():
            return
        functional = any(
            p.requires_grad and p.is_leaf and not isinstance(p, nn.Parameter)
            for model in self.layout.models()
            for p in model.parameters()
        )
        found = next((p for p in self._without_gradient if p.grad is not None), None)
        if functional or found is not None:
            self._has_warned = True
            problem = (
                "the model is called with other tensors in place of its parameters (torch.func.functional_call)"
                if found is None
                else f"{self.layout.names.get(found, 'a parameter')} has a gradient that no backward pass through this "
                "model has computed"
            )
            warnings.warn(
                f"{problem}, so nothing has been centered in backward: center such a gradient with "
                "gradcentral.center(gradient, gradcentral.attached(model)[0].layout[name])",
                stacklevel=2,
            )


def parameters_to_hook(layout: WeightLayout) -> list[Tensor]:
    """Return the parameters that a layout centers, and the lazy ones, which it may center once they have a shape."""
    return [entry.parameter for entry in layout.entries if entry.vectors is not None or entry.reason == LAZY]


def hooks_of(parameters: Iterable[Tensor]) -> list[GradientHooks]:
    """Return what handles have registered on some of these parameters and not removed."""
    with torch._C.DisableTorchFunctionSubclass():  # otherwise lazy parameters refuse this
        found = [hook for p in parameters for hook in (p._backward_hooks or {}).values()]
    return [*dict.fromkeys(hook.owner for hook in found if isinstance(hook, _GradientHook))]


class _GradientHook:
    """The hook on one parameter."""

    __torch_unserializable__ = True  # a copy of the model warns when it is trained; see `_AfterForward`

    def __init__(self, owner: GradientHooks, parameter: Tensor) -> None:
        self.owner = owner
        self._parameter = parameter

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self.owner.centered(self._parameter, gradient)


class _AfterForward:
    """The hook on a model. It runs after the forward pass, when lazy parameters have their shapes."""

    def __init__(self, owner: GradientHooks) -> None:
        self._owner = owner

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            self._owner.after_forward()

    def __reduce__(self) -> tuple[type[_AfterForwardOfCopy], tuple[()]]:
        return _AfterForwardOfCopy, ()


class _AfterForwardOfCopy:
    """The hook on a copy of a model, whose parameters torch copies without their hooks."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not module.training:
            return
        if any(p.requires_grad for p in module.parameters()):
            _remove_copied_hooks(module)
            warnings.warn(
                "this model is a copy, made by copy.deepcopy or pickle, of a model that is centered in backward; the "
                "copy is not: call gradcentral.centralize_in_backward(model) for it too",
                stacklevel=2,
            )


def _remove_copied_hooks(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, _AfterForwardOfCopy)]:
        del model._forward_hooks[key]


def _register(parameter: Tensor, hook: _GradientHook) -> Any:
    """Register a hook on a parameter, also if it is frozen or lazy now and will be trained later."""
    frozen = not parameter.requires_grad
    with torch._C.DisableTorchFunctionSubclass():  # otherwise lazy parameters refuse hooks
        if frozen:
            parameter.requires_grad_()
        try:
            return parameter.register_hook(hook)  # type: ignore[no-untyped-call]
        finally:
            if frozen:
                parameter.requires_grad_(False)


def _is_registered(hook: Any) -> bool:
    return hook is not None and hook.id in (hook.hooks_dict_ref() or ())


def _is_fsdp2(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
