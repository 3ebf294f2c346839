"""A warning for an optimizer whose weights change although its step, in which GC centers, is never called."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.gradient_hooks import hooks_of
from gradcentral.kernels.forms import is_plain
from gradcentral.kernels.planner import dispatch_is_observed
from gradcentral.step_hooks import holds, path_to_inner, wraps
from gradcentral.targets import Targets

__all__ = ["Stepping", "watch_for_steps"]

# Weights may change a few times before the first step: some methods add noise to them for each of several samples, and
# users load or clip weights.
_CHANGES = 8


class Stepping(Protocol):
    """An object that centers in an optimizer's step and records whether it has been called."""

    stepped: bool
    targets: Targets


def watch_for_steps(stepping: Stepping, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Warn once if a parameter keeps changing between backward passes before the first step.

    The parameter is the smallest one, and it is compared with a copy after each backward pass. After the first step
    nothing is left to do, so the hook removes itself.
    """
    watchable = [p for p in parameters if p.requires_grad and p.is_leaf and p.numel() and is_plain(p)]
    if watchable:
        _Watch(stepping, optimizer, min(watchable, key=Tensor.numel))


class _Watch:
    __torch_unserializable__ = True  # a model that is sent to another process leaves the hook behind

    def __init__(self, stepping: Stepping, optimizer: Optimizer, parameter: Tensor) -> None:
        # Not a weak reference, because torch cannot swap tensors that have one (swap_module_params_on_conversion).
        self._id = id(parameter)
        self._stepping = weakref.ref(stepping)
        self._optimizer = weakref.ref(optimizer)
        self._first: Tensor | None = None
        self._latest: Tensor | None = None
        self._changes = 0
        # Not register_post_accumulate_grad_hook, since other libraries refuse parameters that have such hooks.
        self._hook = parameter.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, gradient: Tensor) -> None:
        stepping, optimizer = self._stepping(), self._optimizer()
        parameter = None if optimizer is None else self._find(optimizer)
        if stepping is None or optimizer is None or parameter is None or stepping.stepped:
            self._hook.remove()
            return
        # The comparison below reads values, so it synchronizes with the device.
        if torch.compiler.is_compiling() or dispatch_is_observed() or parameter.is_meta:
            return
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if stepping.targets.paused:  # the weights may change without being centered
            self._first = None
            return
        now, first, latest = parameter.detach(), self._first, self._latest
        if first is None or latest is None or _form(first) != _form(now):
            self._first = self._latest = now.clone()
            self._changes = 0
        elif torch.allclose(now, first):  # SAM perturbs and restores the weights in each accumulated batch
            self._changes = 0
        elif not torch.equal(now, latest):
            self._latest = now.clone()
            self._changes += 1
        if self._changes == _CHANGES:
            self._hook.remove()
            if not hooks_of([parameter]):  # otherwise it is centered in backward
                _warn(stepping, optimizer, parameter)

    def _find(self, optimizer: Optimizer) -> Tensor | None:
        return next((p for group in optimizer.param_groups for p in group["params"] if id(p) == self._id), None)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape


def _warn(stepping: Stepping, optimizer: Optimizer, parameter: Tensor) -> None:
    others = _other_optimizers(optimizer, parameter)
    if any(_centers(other, stepping) for other in others):
        return
    if (path := path_to_inner(optimizer)) is not None:
        remedy = f"attach to the optimizer inside: gradcentral.centralize(optimizer{path}, model)"
    elif others:
        remedy = (
            f"another optimizer, {type(others[0]).__name__}, holds the same weights: attach to it with "
            "gradcentral.centralize(other_optimizer, model), or ignore this if it is meant to train without GC"
        )
    else:
        remedy = "center each gradient when backward() computes it: gradcentral.centralize_in_backward(model)"
    warnings.warn(
        f"the weights change, but {type(optimizer).__name__}.step(), where Gradient Centralization is attached, is not "
        f"called, so nothing is centered; {remedy}",
        stacklevel=2,
    )


def _other_optimizers(optimizer: Optimizer, parameter: Tensor) -> list[Optimizer]:
    """Return the optimizers that also hold a parameter, except wrappers of this one."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Optimizer) and one is not optimizer]
    return [one for one in found if holds(one, parameter) and not wraps(one, optimizer)]


def _centers(other: Optimizer, stepping: Stepping) -> bool:
    """Return whether an optimizer of gradcentral, or one whose step has centered, trains the weights."""
    if isinstance(getattr(other, "targets", None), Targets):
        return True
    owners = [getattr(hook, "__self__", None) for hook in getattr(other, "_optimizer_step_pre_hooks", {}).values()]
    return any(type(owner) is type(stepping) and owner.stepped for owner in owners)
