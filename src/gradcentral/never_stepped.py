"""A warning for an optimizer whose weights change although its step, in which GC centers, is never called."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.gradient_hooks import hooks_of
from gradcentral.local_shard import is_sharded
from gradcentral.step_hooks import path_to_inner

__all__ = ["Stepping", "watch_for_steps"]

# SAM changes the weights between two backward passes and restores them before the first step of its base optimizer.
_CHANGES = 2


class Stepping(Protocol):
    """An object that records whether its optimizer's step has been called."""

    stepped: bool


def watch_for_steps(stepping: Stepping, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Warn once if a parameter changes repeatedly between backward passes before the first step.

    The parameter is the smallest one, and it is compared with a copy after each backward pass. After the first step
    nothing is left to do, so the hook removes itself.
    """
    watchable = [p for p in parameters if p.requires_grad and p.is_leaf and p.numel() and not is_sharded(p)]
    if watchable:
        _Watch(stepping, optimizer, min(watchable, key=Tensor.numel))


class _Watch:
    __torch_unserializable__ = True  # a model that is sent to another process leaves the hook behind

    def __init__(self, stepping: Stepping, optimizer: Optimizer, parameter: Tensor) -> None:
        self._parameter = weakref.ref(parameter)
        self._stepping = weakref.ref(stepping)
        self._optimizer = weakref.ref(optimizer)
        self._weights: Tensor | None = None
        self._changes = 0
        # Not register_post_accumulate_grad_hook, since other libraries refuse parameters that have such hooks.
        self._hook = parameter.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, gradient: Tensor) -> None:
        stepping, optimizer, parameter = self._stepping(), self._optimizer(), self._parameter()
        if stepping is None or optimizer is None or parameter is None or stepping.stepped:
            self._hook.remove()
            return
        # The comparison below synchronizes with the device.
        if torch.compiler.is_compiling() or (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._weights is not None and not torch.equal(parameter.detach(), self._weights):
            self._changes += 1
            self._weights = None
        if self._weights is None:
            self._weights = parameter.detach().clone()
        if self._changes == _CHANGES:
            self._hook.remove()
            if not hooks_of([parameter]):  # otherwise it is centered in backward
                _warn(optimizer)


def _warn(optimizer: Optimizer) -> None:
    if (path := path_to_inner(optimizer)) is not None:
        remedy = f"attach to the optimizer inside: gradcentral.centralize(optimizer{path}, model)"
    else:
        remedy = "center each gradient when backward() computes it: gradcentral.centralize_in_backward(model)"
    warnings.warn(
        f"the weights change, but {type(optimizer).__name__}.step(), where Gradient Centralization is attached, is not "
        f"called, so nothing is centered; {remedy}",
        stacklevel=2,
    )
