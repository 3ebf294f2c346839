"""The planner of centering and steps: it chooses the kernels for each tensor and the tensors that share a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gradcentral.kernels import native, triton
from gradcentral.kernels.forms import is_plain
from gradcentral.kernels.loops import Loop, loop_over
from gradcentral.weight_vectors import WeightVectors

__all__ = ["KernelGroup", "dispatch_is_observed", "group_by_kernels", "kernels_for", "loop_of", "unavailable_reasons"]

_T = TypeVar("_T")

_CHOICES = ("reference", "native", "triton")


def unavailable_reasons() -> dict[str, str]:
    """Return, for each kind of kernels, the reason why it cannot be used on this machine; empty if it can.

    Examples:
        >>> from gradcentral import kernels
        >>> kernels.unavailable_reasons()["reference"]
        ''
    """
    return {"reference": "", "native": native.unavailable_reason(), "triton": triton.unavailable_reason()}


def dispatch_is_observed() -> bool:
    """Return whether a dispatch mode is active, such as the tracing of ``make_fx``.

    It must see every operator, and the kernels bypass it, because they write through pointers.
    """
    return bool(torch._C._len_torch_dispatch_stack())


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Return the module whose kernels process tensors on this tensor's device; None for the reference path."""
    if dispatch_is_observed():
        return None
    return triton if triton.serves(tensor) else native if native.serves(tensor) else None


def loop_of(kernels: ModuleType, tensor: Tensor, vectors: WeightVectors | None) -> Loop | None:
    """Return the loop over a tensor, or None unless it is plain and dense and the kernels accept its dtype and loop.

    Args:
        kernels: a module of kernels.
        tensor: the tensor.
        vectors: its weight vectors; None if it is not centered.
    """
    taken = kernels.serves(tensor) and is_plain(tensor) and tensor.dtype in kernels.DTYPES
    loop = loop_over(vectors, tensor.shape, tensor.stride()) if taken else None
    return loop if loop is not None and loop.inner <= kernels.MOST_TAPS else None


def _check_choice() -> None:
    choice = os.environ.get("GRADCENTRAL_KERNELS", "")
    if choice and choice not in _CHOICES:
        raise ImportError(f"unknown GRADCENTRAL_KERNELS={choice!r}; choose from {', '.join(_CHOICES)}, or unset it")
    if choice in ("native", "triton") and (reason := unavailable_reasons()[choice]):
        raise ImportError(f"GRADCENTRAL_KERNELS={choice}, but the {choice} kernels cannot be used: {reason}")


_check_choice()


class KernelGroup(NamedTuple):
    """Tensors that one kernel call processes."""

    kernels: ModuleType
    positions: list[int]
    """Positions of the tensors in the sequence that was grouped."""
    loops: list[Loop]

    def select(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return this group's items of a sequence that is parallel to the grouped one."""
        return items if len(self.positions) == len(items) else [items[position] for position in self.positions]


def group_by_kernels(
    tensors: Sequence[Tensor],
    vectors: Sequence[WeightVectors | None],
    companions: Callable[[ModuleType, int], Sequence[Tensor] | None] = lambda kernels, position: (),
) -> tuple[list[KernelGroup], list[int]]:
    """Group tensors by the kernels that process them, their device and their types.

    Args:
        tensors: the tensors to be centered or updated.
        vectors: their weight vectors; None for a tensor that is not centered.
        companions: a function of the kernels and a position that returns the further tensors of the call (gradient and
            state), whose types must be the same throughout a group, or None if the kernels cannot accept them.

    Returns:
        The groups, and the positions of the remaining tensors, for the reference path.
    """
    groups: dict[object, KernelGroup] = {}
    rest: list[int] = []
    for position, (tensor, of_tensor) in enumerate(zip(tensors, vectors, strict=True)):
        kernels = kernels_for(tensor)
        loop = None if kernels is None else loop_of(kernels, tensor, of_tensor)
        others = None if kernels is None or loop is None else companions(kernels, position)
        if kernels is None or loop is None or others is None:
            rest.append(position)
            continue
        form = (kernels, tensor.device, tensor.dtype, *(other.dtype for other in others))
        group = groups.setdefault(form, KernelGroup(kernels, [], []))
        group.positions.append(position)
        group.loops.append(loop)
    return [*groups.values()], rest
