"""Run a model without changing it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["preserve_state"]


@contextmanager
def preserve_state(*modules: nn.Module, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Restore modules and random number generators when the block ends, even after an exception.

    It restores the parameters and buffers of each module (an ``Embedding`` with ``max_norm`` rescales its weights in
    every forward pass, BatchNorm keeps running statistics), the gradients (the same tensors with the same values), and
    the training mode of every submodule. It always restores the global generators of Python, NumPy and torch (CPU and
    CUDA), so ``preserve_state()`` without modules protects only the random numbers.

    Inside the block every gradient is None, and post-accumulate-grad hooks, which may step an optimizer, do not run.
    The block holds one more copy of each module in memory. ``generators``, such as that of a ``DataLoader``, are
    also restored.

    Raises:
        ValueError: a parameter or buffer is lazy, and a forward pass would initialize it.
    """
    with ExitStack() as stack:
        # The devices are listed because otherwise torch warns if there are several.
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
        for module in modules:
            _preserve_module(module, stack.callback)
        yield


def _preserve_module(model: nn.Module, at_exit: Callable[..., object]) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        raise ValueError(f"model: {lazy[0]} is uninitialized (lazy); run one forward pass of the model first")
    for _, tensor in tensors:
        at_exit(_restore, tensor, tensor.detach().clone())
    for parameter in model.parameters():
        at_exit(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None
        if hooks := getattr(parameter, "_post_accumulate_grad_hooks", None):
            at_exit(_refill, hooks, hooks.copy())
            hooks.clear()
    for module in model.modules():
        at_exit(setattr, module, "training", module.training)
        # A module may write into a buffer, replace it by another tensor, or register a new one.
        for container in (module._buffers, module._non_persistent_buffers_set):
            at_exit(_refill, container, container.copy())


@torch.no_grad()
def _restore(tensor: Tensor, value: Tensor) -> None:
    if not torch.equal(tensor, value):
        tensor.copy_(value)


def _refill(container: Any, content: Any) -> None:
    container.clear()  # in place, because torch refers to these dictionaries and sets
    container.update(content)
