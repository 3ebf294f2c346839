"""What a plan relies on about tensors besides their pointers, compared at each step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["OF_CENTERED", "OF_GRADIENTS", "OF_LASTING", "TensorForm"]

Property = Callable[[Tensor], Any]
"""A property of a tensor that a plan relies on, such as ``Tensor.stride``."""

# A step must not take the host longer than the device, so only properties that can differ are compared: torch itself
# ensures that a gradient has the shape and the device of its parameter, but not that it is dense or has its strides.
OF_GRADIENTS: tuple[Property, ...] = (Tensor.stride, Tensor.numel, attrgetter("dtype"), type, Tensor.is_neg)
OF_CENTERED: tuple[Property, ...] = (
    Tensor.stride,
    Tensor.size,
    attrgetter("dtype"),
    type,
    Tensor.is_neg,
    attrgetter("device"),
)
# Strides of parameters and states: their view may have been changed in place. The caller compares their pointers.
OF_LASTING: tuple[Property, ...] = (Tensor.stride,)


class TensorForm:
    """The form of some tensors, to compare with that of others.

    The guards of ``torch.compile`` compare the types, dtypes, devices, sizes, strides and dispatch keys (which include
    a lazy negation and sparsity) of all tensors in one call, several times as fast as Python can. They are not part of
    torch's public interface. Where they are missing, and where they refuse tensors, the properties decide: the guards
    also refuse differences that do not matter here, such as ``requires_grad``, and tensors that occur twice.

    Args:
        tensors: the tensors.
        properties: the properties that matter.
    """

    def __init__(self, tensors: Sequence[Tensor], properties: Sequence[Property]) -> None:
        self._properties = properties
        self._values = self._read(tensors)
        self._guard = _guard_of(tensors, sized=properties is not OF_LASTING) if _guards_work() else None

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these tensors, as many as the others, have the same form."""
        return (self._guard is not None and self._guard(*tensors)) or self._read(tensors) == self._values

    def _read(self, tensors: Sequence[Tensor]) -> list[Any] | None:
        try:
            return [[*map(get, tensors)] for get in self._properties]
        except RuntimeError:  # sparse tensors have no strides
            return None


def _guard_of(tensors: Sequence[Tensor], sized: bool = True) -> Callable[..., bool]:
    """Return a function that returns whether the tensors passed to it have the form of these; ``sized``: and sizes."""
    guards: Any = torch._C._dynamo.guards.TensorGuards  # type: ignore[attr-defined, unused-ignore]
    sizes = [[*tensor.shape] if sized else [None] * tensor.ndim for tensor in tensors]
    strides = [[*tensor.stride()] for tensor in tensors]
    check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


@functools.cache
def _guards_work() -> bool:
    """Return whether this version of torch has the guards, and they compare what a form consists of."""
    tensor = torch.zeros(2, 3, dtype=torch.float32, device="cpu")
    others = (
        tensor.double(),
        tensor.as_strided((2, 3), (1, 2)),
        tensor[:1],
        tensor.flatten(),
        tensor.to_sparse(),
        torch._neg_view(tensor),
        torch.nn.Parameter(tensor),
        tensor.to("meta"),
    )
    try:
        guard = _guard_of([tensor])
        return guard(tensor.clone()) is True and not any(map(guard, others))
    except Exception:  # whatever a version of torch raises in which the guards have changed
        return False
