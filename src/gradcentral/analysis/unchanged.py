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

    Its gradients (the very tensors, with their values), its buffers such as BatchNorm's running statistics, the mode
    of each of its modules, and the generators of Python, NumPy and torch. Inside the block every ``p.grad`` is None.
    Weights are not copied: who moves them puts them back.

    Raises:
        ValueError: a parameter is lazy, so that running the model would make its values.

    Examples:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with unchanged(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"model: {lazy[0]} has no values yet: run one forward of the model first")
    modes = [(module, module.training) for module in model.modules()]
    # A module may write into a buffer or put another tensor in its place.
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in _own_buffers(m)]
    gradients = [(p, p.grad) for p in model.parameters()]
    with random_numbers_unchanged():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
                    module._buffers[name] = buffer
            for module, mode in modes:
                module.training = mode


@contextmanager
def random_numbers_unchanged() -> Iterator[None]:
    """Put the generators of Python, of NumPy where it is in use, and of torch on every device back afterwards."""
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


def _own_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
