"""Run a model without changing it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["preserve_state"]

_CONTAINERS = (dict, OrderedDict, set, list, deque)


@contextmanager
def preserve_state(*modules: nn.Module, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Restore modules and random number generators when the block ends, even after an exception.

    It restores the parameters and buffers of each module (an ``Embedding`` with ``max_norm`` rescales its weights in
    every forward pass, BatchNorm keeps running statistics), the gradients (the same tensors with the same values),
    ``requires_grad``, hooks, the training mode of every submodule and its other attributes, including the items of
    lists and dictionaries, but not objects inside them. It always restores the global generators of Python, NumPy and
    torch (CPU and CUDA), so ``preserve_state()`` without modules protects only the random numbers. If one restoration
    fails, the others still take place before the exception is raised.

    Inside the block every gradient is None, and post-accumulate-grad hooks, which may step an optimizer, do not run.
    With modules, the block leaves ``torch.inference_mode``, and it holds one more copy of each module in memory.
    ``generators``, such as that of a ``DataLoader``, are also restored.

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
        if modules and torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for module in modules:
            _preserve_module(module, stack.callback)
        yield


def _preserve_module(model: nn.Module, at_exit: Callable[..., object]) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        raise ValueError(f"model: {lazy[0]} is uninitialized (lazy); run one forward pass of the model first")
    for _, tensor in tensors:
        for part in _plain_parts(tensor):
            at_exit(_restore, part, part.detach().clone())
    for parameter in model.parameters():
        at_exit(setattr, parameter, "grad", parameter.grad)
        at_exit(_restore_requires_grad, parameter, parameter.requires_grad)
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            at_exit(_restore_hooks, parameter, kind, dict(getattr(parameter, kind, None) or {}))
        _restore_hooks(parameter, "_post_accumulate_grad_hooks", {})
        parameter.grad = None
    for module in model.modules():
        _preserve_attributes(module, at_exit)


def _preserve_attributes(module: nn.Module, at_exit: Callable[..., object]) -> None:
    """Restore what a module may assign in its forward pass: its attributes, among them buffers and hooks."""
    attributes = vars(module)
    for value in attributes.values():
        if type(value) in _CONTAINERS:
            at_exit(_refill, value, value.copy())
        elif isinstance(value, torch.Generator):
            at_exit(value.set_state, value.get_state())
    at_exit(_refill, attributes, attributes.copy())
    if isinstance(module, torch.jit.ScriptModule):  # its mode and buffers are stored in C++
        for name, buffer in module.named_buffers(recurse=False):
            at_exit(setattr, module, name, buffer)
        if hasattr(module, "training"):  # torch.jit.freeze removes it
            at_exit(setattr, module, "training", module.training)


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a wrapper subclass consists of, such as quantized data and scales, or the tensor."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return [tensor]
    names, _ = wrapper.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(wrapper, name))]


def _restore(tensor: Tensor, value: Tensor) -> None:
    try:
        unchanged = torch.equal(tensor, value)
    except Exception:  # not implemented for sparse tensors and some subclasses
        unchanged = False
    if not unchanged:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.shape == value.shape:
                tensor.copy_(value)
            else:
                tensor.data = value


def _restore_requires_grad(parameter: Tensor, requires_grad: bool) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad = requires_grad


def _restore_hooks(parameter: Tensor, kind: str, hooks: dict[int, Any]) -> None:
    if (current := getattr(parameter, kind, None)) is not None:
        _refill(current, hooks)


def _refill(container: Any, content: Any) -> None:
    container.clear()  # in place, because torch refers to these dictionaries and sets
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
