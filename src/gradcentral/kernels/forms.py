"""Types that the native and the Triton kernels share, and the base class of their plans. It imports no kernels.

A *plan* caches everything about some tensors that rarely changes: shapes, strides, dtypes and the division of the
work. Every call compares it with the tensors (`fits`), and the caller rebuilds it when they differ. Pointers to
gradients are never cached: every call reads them from the tensors.
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.loops import Loop
from gradcentral.kernels.tensor_form import OF_CENTERED, OF_GRADIENTS, OF_LASTING, TensorForm
from gradcentral.projection import Strength

__all__ = [
    "BasePlan",
    "Coefficients",
    "DeviceCoefficients",
    "Operation",
    "PlacedLoops",
    "Placement",
    "States",
    "UpdateRule",
    "all_match",
    "is_counter",
    "is_plain",
    "same_objects",
]


POINTERS = 6
"""Columns of a pointer table: weight, gradient, momentum, squares, largest squares, step counter."""


class Placement(IntEnum):
    """The target of centering for one parameter: nothing, the gradient g, the change of the weights, or g + λw."""

    PLAIN = 0
    GRADIENT = 1
    UPDATE = 2
    REGULARIZED = 3


PlacedLoops = Sequence[tuple[Loop, Placement]]
"""The loop and the placement of each parameter."""


class UpdateRule(IntEnum):
    """The update rules with a fused kernel."""

    SGD = 0
    MOMENTUM = 1
    ADAM = 2
    AMSGRAD = 3


class Operation(IntEnum):
    """Centering without a step. The numbers continue those of `UpdateRule`: one number selects a kernel."""

    CENTER = 4
    MEANS = 5
    RESTORE = 6
    SHIFT = 7
    """`center_regularized`: like RESTORE, but a mean that is not finite is subtracted, as in CENTER."""


class Coefficients(NamedTuple):
    """Coefficients of an update rule; the C structure of the same name in c/kernels.h documents each field."""

    lr: float = 0.0
    l2: float = 0.0
    decay: float = 0.0
    momentum: float = 0.0
    keep: float = 0.0
    nesterov: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    epsilon: float = 0.0
    scale: float = 1.0
    strength: float = 1.0


class DeviceCoefficients(NamedTuple):
    """Coefficients for Triton, some of them on the device, where the kernel reads them without synchronizing."""

    coefficients: Coefficients
    """Coefficients for a learning rate of 1 and unscaled gradients."""
    lr: float | Tensor
    grad_scale: Tensor | None = None
    """Set by a GradScaler on fused optimizers: the gradients are divided by it."""
    found_inf: Tensor | None = None
    """Set by a GradScaler on fused optimizers: if it is not 0, the step changes nothing."""
    strength: Tensor | None = None
    """Replaces that of the coefficients."""


class States(NamedTuple):
    """The optimizer's state of some parameters: one list per kind of state, None where the update rule has none."""

    momentum: list[Tensor] | None = None
    squares: list[Tensor] | None = None
    largest_squares: list[Tensor] | None = None
    steps: list[Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        """Apply ``function`` to every tensor."""
        return States(*(None if column is None else [*map(function, column)] for column in self))


def same_objects(one: Collection[object], other: Collection[object]) -> bool:
    """Return whether two collections hold the same objects; ``==`` would compare tensors element by element."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain array in memory: not a subclass, not sparse, without a lazy negation."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()


def all_match(parameter: Tensor, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Return whether the tensors are plain and have the device, shape and strides of the parameter."""

    def strides(tensor: Tensor) -> list[int]:
        return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]

    return all(
        is_plain(tensor)
        and tensor.dtype in dtypes
        and tensor.device == parameter.device
        and tensor.shape == parameter.shape
        and strides(tensor) == strides(parameter)
        for tensor in tensors
    )


def is_counter(tensor: object, device: torch.device, dtypes: Sequence[torch.dtype]) -> bool:
    """Return whether this is None or a step counter as torch creates it: one number on the device, of a given dtype."""
    return tensor is None or (
        type(tensor) is Tensor and tensor.numel() == 1 and tensor.device == device and tensor.dtype in dtypes
    )


class BasePlan:
    """One kernel call for tensors of one device and the same dtypes: a fused step, or centering alone.

    Args:
        rule: the update rule; None for centering.
        params: the parameters, with the local shard of a DTensor; empty for centering.
        grads: their gradients, or the tensors to be centered.
        states: the states of the parameters.
        loops: the loop and the placement of each parameter or tensor.
    """

    means_dtype: ClassVar[torch.dtype]

    def __init__(
        self, rule: UpdateRule | None, params: list[Tensor], grads: list[Tensor], states: States, loops: PlacedLoops
    ) -> None:
        self.rule = rule
        self.params = params
        self.states = states
        self.device = grads[0].device
        # The columns of the pointer table, one pointer per parameter; gradients take their place in each call.
        columns = [params or None, None, *states]
        self._lasting = [tensor for column in columns if column is not None for tensor in column]
        self._lasting_pointers = [*map(Tensor.data_ptr, self._lasting)]
        self._shaped = [tensor for column in columns[:-1] if column is not None for tensor in column]
        self._lasting_form = TensorForm(self._shaped, OF_LASTING)
        self._gradient_form = TensorForm(grads, OF_GRADIENTS if params else OF_CENTERED)
        self._gradient_pointers: list[int] = []
        zeros = [0] * len(grads)
        filled = [zeros if column is None else [*map(Tensor.data_ptr, column)] for column in columns]
        self._columns = array("q", [pointer for column in filled for pointer in column])
        self._write = struct.Struct(f"{len(grads)}q").pack_into
        self._vectors = sum(loop.groups * loop.units * loop.phases for loop, _ in loops)
        self._prepare(grads, loops)

    def _prepare(self, grads: list[Tensor], loops: PlacedLoops) -> None:
        """Divide the work; the last step of the constructor."""
        raise NotImplementedError

    def fits(self, grads: list[Tensor]) -> bool:
        """Return whether gradients, parameters and states still have the planned form.

        Replacing the data of a parameter or a state shows in its pointer, because the replacement is allocated while
        the original exists. Strides are compared too, because code may change the view of a tensor in place.
        """
        return (
            self._gradient_form.matches(grads)
            and [*map(Tensor.data_ptr, self._lasting)] == self._lasting_pointers
            and self._lasting_form.matches(self._shaped)
        )

    def _pointers(self, grads: list[Tensor]) -> array[int]:
        """Return the pointers to parameters, gradients and each kind of state, concatenated; 0 for a missing state.

        `fits` has just compared those to parameters and states. Tensors to be centered take the place of both
        parameters and gradients. The next call overwrites the result.
        """
        pointers = [*map(Tensor.data_ptr, grads)]
        if pointers != self._gradient_pointers:
            self._gradient_pointers = pointers
            self._write(self._columns, self._columns.itemsize * len(grads), *pointers)
            if not self.params:
                self._write(self._columns, 0, *pointers)
        return self._columns

    def run(self, grads: list[Tensor], coefficients: Any, fresh: list[bool]) -> None:
        """Take the step. Call `fits` immediately before.

        Args:
            grads: the gradients.
            coefficients: `Coefficients`; for Triton, `DeviceCoefficients`.
            fresh: whether the momentum buffer of each parameter is new, so that it starts as the gradient itself;
                empty if none is.
        """
        raise NotImplementedError

    def _center(self, tensors: list[Tensor], operation: Operation, means: Tensor | None, strength: Strength) -> None:
        raise NotImplementedError

    def center_(self, tensors: list[Tensor], strength: Strength) -> None:
        """Center each tensor in place."""
        self._center(tensors, Operation.CENTER, None, strength)
        torch.autograd.graph.increment_version(tensors)

    def means(self, tensors: list[Tensor]) -> Tensor:
        """Return the means of all weight vectors of all tensors, concatenated."""
        means = torch.empty(self._vectors, dtype=self.means_dtype, device=self.device)
        self._center(tensors, Operation.MEANS, means, 1.0)
        return means

    def shift_(self, tensors: list[Tensor], means: Tensor, strength: Strength) -> None:
        """Shift the mean of every weight vector to the given value, in the order of `means`, or part of the way."""
        self._center(tensors, Operation.SHIFT, means, strength)
        torch.autograd.graph.increment_version(tensors)

    def restore_(self, tensors: list[Tensor], means: Tensor, strength: Strength) -> None:
        """Shift the mean of every weight vector back to the value that `means` returned, or part of the way."""
        if means.numel() != self._vectors:
            raise RuntimeError(
                "parameters changed shape during the step, so their means cannot be restored: change shapes "
                "between steps"
            )
        self._center(tensors, Operation.RESTORE, means, strength)
        torch.autograd.graph.increment_version(tensors)
