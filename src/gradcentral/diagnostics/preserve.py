"""Look at a model without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["random_numbers_unchanged", "unchanged"]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was when the block ends, also by an exception.

    Its weights and buffers (an ``Embedding`` with ``max_norm`` rescales its weights in each forward pass, BatchNorm
    keeps running statistics), its gradients (the very tensors, with their values), the mode of each of its modules, and
    the generators of Python, NumPy and torch. Inside the block every ``p.grad`` is None, and hooks on accumulated
    gradients, which may step an optimizer, do not run. Takes the memory of one more copy of the model.

    Raises:
        ValueError: a parameter or buffer is lazy, so that running the model would make its values.

    Examples:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with unchanged(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        raise ValueError(f"model: {lazy[0]} has no values yet: run one forward of the model first")
    modes = [(module, module.training) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for _, tensor in tensors]
    # A module may write into a buffer, put another tensor in its place, or make one where there was none.
    places = [(m._buffers, {**m._buffers}) for m in model.modules()]
    persistence = [(m._non_persistent_buffers_set, {*m._non_persistent_buffers_set}) for m in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    hooks = [(h, {**h}) for p in model.parameters() if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    with random_numbers_unchanged():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for registered, _ in hooks:
                registered.clear()
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for registered, before_hooks in hooks:
                registered.update(before_hooks)
            for buffers, before in places:
                buffers.clear()
                buffers.update(before)
            for names, before_names in persistence:
                names.clear()
                names.update(before_names)
            with torch.no_grad():
                for tensor, value in values:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
            for module, mode in modes:
                module.training = mode


@contextmanager
def random_numbers_unchanged() -> Iterator[None]:
    """Put the generators of Python, of NumPy where it is in use, and of torch on the CPU and CUDA back afterwards."""
    numpy = sys.modules.get("numpy")
    python, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    # Named one by one: torch warns when it is left to find several devices by itself.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
