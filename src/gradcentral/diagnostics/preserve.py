"""Run a model without changing it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["preserve_state"]


@contextmanager
def preserve_state(*modules: nn.Module, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Restore modules and random number generators when the block ends, also after an exception.

    Restored for each module are its parameters and buffers (an ``Embedding`` with ``max_norm`` rescales its weights in
    every forward pass, BatchNorm keeps running statistics), its gradients (the same tensors with the same values), and
    the training mode of every submodule. The global generators of Python, NumPy and torch (CPU and CUDA) are always
    restored, so ``preserve_state()`` protects the random numbers alone.

    Inside the block every gradient is None, and post-accumulate-grad hooks, which may step an optimizer, do not run.
    The block holds one more copy of each module in memory.

    Args:
        modules: the modules to restore.
        generators: further generators to restore, such as that of a ``DataLoader``.

    Raises:
        ValueError: a parameter or buffer is lazy, so a forward pass would initialize it.
    """
    with ExitStack() as stack:
        # The devices are listed because torch warns when it has to find several by itself.
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
        for module in modules:
            stack.enter_context(_preserve_module(module))
        yield


@contextmanager
def _preserve_module(model: nn.Module) -> Iterator[None]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        raise ValueError(f"model: {lazy[0]} is uninitialized (lazy); run one forward pass of the model first")
    modes = [(module, module.training) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for _, tensor in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    hooks = [h for p in model.parameters() if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    # A module may write into a buffer, replace it by another tensor, or register a new one.
    buffers = [b for m in model.modules() for b in (m._buffers, m._non_persistent_buffers_set)]
    containers: list[tuple[Any, Any]] = [(container, container.copy()) for container in (*hooks, *buffers)]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for hook in hooks:
            hook.clear()
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for container, content in containers:  # in place, because torch refers to these dictionaries and sets
            container.clear()
            container.update(content)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for module, mode in modes:
            module.training = mode
