"""Plans: the tables of one launch, means on the device as long as the tensors have the form they were made for.

Shapes, strides and the division of the work change rarely and are compared at every call; pointers are read anew at
every call and uploaded when one has changed, without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from ctypes import c_float
from operator import attrgetter

import torch
import triton.language as tl
from torch import Tensor

from gradcentral.kernels import forms
from gradcentral.kernels.forms import Coefficients, Operation, Placement, States, UpdateRule
from gradcentral.kernels.loops import Loop
from gradcentral.kernels.triton import DeviceCoefficients
from gradcentral.kernels.triton.division import TILE, columns_beside, divide
from gradcentral.kernels.triton.rules import INTERPRETED
from gradcentral.kernels.triton.step import run
from gradcentral.weight_vectors import WeightVectors

__all__ = ["CenteringPlan", "StepPlan"]

_COLUMNS = 6
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,  # see rules.py
}
_NO_COEFFICIENTS = DeviceCoefficients(Coefficients(), 0.0)
WARPS, REGISTERS = 8, 64
"""Of a program. With that few registers a thread, four programs share a multiprocessor and hide each other's waits."""


class _Table:
    """The pointers of a launch on the device.

    A captured step has a table of its own, which later steps leave alone: what is uploaded while a CUDA graph is
    captured is uploaded at each replay from the same pinned memory, means here.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device, self._size = device, size
        self._values: list[int] = []
        self._aligned = True
        self._current = self._empty()
        self._spare: tuple[Tensor, Tensor] | None = self._pair()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def uploaded(self, values: list[int]) -> tuple[Tensor, bool]:
        """The table with these pointers, and whether all of them are divisible by 16."""
        if values != self._values or self._capturing():
            aligned = all(value % 16 == 0 for value in values)
            if self._capturing():
                return self._for_capture(values), aligned
            host, _ = self._pair()
            host.copy_(torch.tensor(values))
            self._current.copy_(host, non_blocking=True)
            self._values, self._aligned = values, aligned
        if self._spare is None:
            self._spare = self._pair()
        return self._current, self._aligned

    def _for_capture(self, values: list[int]) -> Tensor:
        if self._spare is None:
            raise RuntimeError(
                "two steps of one optimizer were captured in CUDA graphs without a step outside of them in between: "
                "capture one step at a time, and call optimizer.step() once before each capture"
            )
        host, table = self._spare
        host.copy_(torch.tensor(values))
        table.copy_(host, non_blocking=True)
        self._captured.append(self._spare)
        self._spare = None
        return table

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _empty(self) -> Tensor:
        return torch.zeros(self._size, dtype=torch.int64, device=self._device)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self._size, dtype=torch.int64, pin_memory=self._device.type == "cuda"), self._empty()


class _Launch:
    """What all launches of a plan have in common."""

    def __init__(self, loops: Sequence[tuple[Loop, int]], grad: torch.dtype, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the tensors of this step have another form than those of the last, and nothing can be planned while "
                "a CUDA graph is captured: take a step like the captured one before"
            )
        self.device = device
        division = divide(loops, grad.itemsize)
        self.n_items, self.n_pieces = len(loops), len(division.pieces)
        self.n_means, self.n_counters = division.means, division.counters
        self.items, self.pieces = division.items.to(device), division.pieces.to(device)
        self.progress = torch.zeros(2 + division.counters, dtype=torch.int32, device=device)
        self.partials = torch.empty(max(1, division.slots), dtype=torch.float32, device=device)
        self.table = _Table(device, _COLUMNS * len(loops))
        self.beside = columns_beside(grad.itemsize)
        self.options = {"num_warps": WARPS}
        if device.type == "cuda":
            self.options["maxnreg"] = REGISTERS
        self.stream = None if device.type != "cuda" else torch.cuda.current_stream(device)

    def __call__(
        self,
        pointers: list[int],
        rule: int,
        placement: int,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        coefficients: DeviceCoefficients = _NO_COEFFICIENTS,
        fresh: Tensor | None = None,
        means: Tensor | None = None,
    ) -> None:
        if self.n_pieces == 0:
            return
        with self._on_device():
            table, aligned = self.table.uploaded(pointers)
            lr = coefficients.lr
            on_device = isinstance(lr, Tensor) and lr.device == self.device
            run[(self.n_pieces,)](
                table,
                self.items,
                self.pieces,
                self.progress,
                self.partials,
                self.partials if means is None else means,
                fresh,
                lr if on_device else None,
                _on(self.device, coefficients.grad_scale),
                _on(self.device, coefficients.found_inf),
                self.n_items,
                self.n_counters,
                0.0 if on_device else float(lr),
                _coefficients(coefficients.coefficients),
                _logarithms(coefficients.coefficients) if rule > UpdateRule.MOMENTUM else (0.0, 0.0, 0.0, 0.0),
                RULE=rule,
                PLACEMENT=placement,
                DAMPENED=fresh is not None,
                WAITS=self.n_counters > 0,
                ALIGNED=aligned,
                WEIGHT=_TYPES[types[0]],
                GRAD=_TYPES[types[1]],
                STATE=_TYPES[types[2]],
                BESIDE=self.beside,
                TILE=TILE,
                **self.options,
            )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.stream is None:
            import numpy

            with numpy.errstate(all="ignore"):  # a GPU does not warn of infinities either
                yield
            return
        current = torch.cuda.current_stream(self.device)
        if current != self.stream and not torch.cuda.is_current_stream_capturing():
            for tensor in (self.items, self.pieces, self.progress, self.partials):
                tensor.record_stream(current)
        elsewhere = torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if elsewhere else nullcontext():
            yield


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return number if number is None or number.device == device else number.to(device, non_blocking=True)


def _coefficients(coefficients: Coefficients) -> tuple[float, ...]:
    of_d, of_m = -1.0, -1.0
    if coefficients.momentum != 0:
        of_d, of_m = -float(coefficients.nesterov), -(coefficients.momentum if coefficients.nesterov else 1.0)
    return (
        coefficients.scale,
        coefficients.l2,
        coefficients.decay,
        coefficients.momentum,
        coefficients.keep,
        of_d,
        of_m,
        1 - coefficients.beta1,
        coefficients.beta2,
        1 - coefficients.beta2,
        coefficients.epsilon,
    )


def _logarithms(coefficients: Coefficients) -> tuple[float, ...]:
    """Of β₁ and β₂, each as the sum of two f32, for a kernel takes no f64."""
    parts: list[float] = []
    for beta in (coefficients.beta1, coefficients.beta2):
        whole = math.log(beta) if beta > 0 else -math.inf
        upper = c_float(whole).value
        parts += [upper, whole - upper if math.isfinite(whole) else 0.0]
    return tuple(parts)


class StepPlan(forms.StepPlan):
    """One fused step of parameters that share their device, dtypes and update rule, in one launch."""

    # A step must not cost the host more time than the device, so only what can differ is compared: torch itself makes
    # sure that a gradient has the shape and the device of its parameter.
    gradient_properties = (Tensor.numel, Tensor.stride, attrgetter("dtype"), type, Tensor.is_neg)
    parameter_properties = (Tensor.stride,)
    lasting_properties = ()

    def __init__(
        self,
        rule: UpdateRule,
        params: list[Tensor],
        grads: list[Tensor],
        states: States,
        loops: list[tuple[Loop, Placement]],
    ) -> None:
        super().__init__(rule, params, grads, states, loops)
        state = params[0].dtype if states.momentum is None else states.momentum[0].dtype
        self._types = (params[0].dtype, grads[0].dtype, state)
        self._placement = max((placement for _, placement in loops), default=0) or Placement.GRADIENT
        self.launch = _Launch(loops, grads[0].dtype, params[0].device)
        self._fresh = torch.zeros(len(params), dtype=torch.int32, device=params[0].device)

    def run(self, grads: list[Tensor], coefficients: DeviceCoefficients, fresh: list[bool]) -> None:
        """Take the step (see `forms.StepPlan.run`) on the current stream, without synchronizing the host."""
        dampened = self.rule == UpdateRule.MOMENTUM and coefficients.coefficients.keep != 1
        if dampened and any(fresh):
            self._fresh.copy_(torch.tensor(fresh))
        flags = self._fresh if dampened else None
        self.launch(self._pointers(grads), self.rule, self._placement, self._types, coefficients, flags)
        torch.autograd.graph.increment_version(self.params)


class CenteringPlan(forms.CenteringPlan):
    """Φ, means (in f32) and their restoration for many tensors of one device and dtype, each in one launch."""

    properties = (Tensor.size, Tensor.stride, attrgetter("dtype"), Tensor.get_device, type, Tensor.is_neg)
    means_dtype = torch.float32

    def __init__(self, tensors: list[Tensor], vectors: list[WeightVectors], loops: list[Loop]) -> None:
        super().__init__(tensors, vectors, loops)
        dtype = tensors[0].dtype
        self._types = (dtype, dtype, dtype)
        self.launch = _Launch([(loop, Placement.GRADIENT) for loop in loops], dtype, self._device)

    def _run(self, tensors: list[Tensor], operation: Operation, means: Tensor | None) -> None:
        pointers = [*map(Tensor.data_ptr, tensors)]
        table = [*pointers, *pointers, *[0] * ((_COLUMNS - 2) * len(pointers))]
        self.launch(table, operation, Placement.GRADIENT, self._types, means=means)
