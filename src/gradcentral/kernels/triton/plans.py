"""Plans for CUDA devices: the tables of one launch, kept on the device while the tensors keep their form.

Pointers are read at every call and uploaded if one has changed, without synchronizing the host.
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

from gradcentral.kernels.forms import (
    POINTERS,
    BaseCenteringPlan,
    BaseStepPlan,
    Coefficients,
    Operation,
    Placement,
    UpdateRule,
)
from gradcentral.kernels.loops import Loop
from gradcentral.kernels.triton import INTERPRETED, DeviceCoefficients
from gradcentral.kernels.triton.division import TILE, columns_beside, divide
from gradcentral.kernels.triton.step import run

__all__ = ["CenteringPlan", "StepPlan"]

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,  # see rules.py
}
_NO_COEFFICIENTS = DeviceCoefficients(Coefficients(), 0.0)
WARPS, REGISTERS = 8, 64
"""Per program. With so few registers per thread, four programs share a multiprocessor and hide each other's latency."""


class _PointerTable:
    """The pointers of a launch, in a table on the device.

    While a CUDA graph is captured, uploading is captured too: every replay uploads again, from the same pinned memory.
    So a captured step has a table of its own, which later steps do not change.
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
        if values != self._values or _capturing(self._device):
            aligned = all(value % 16 == 0 for value in values)
            if _capturing(self._device):
                return self._for_capture(values), aligned
            host, _ = self._pair()
            host.copy_(torch.tensor(values))
            self._current.copy_(host, non_blocking=True)
            self._values, self._aligned = values, aligned
        if self._spare is None:
            self._spare = self._pair()
        return self._current, self._aligned

    def _for_capture(self, values: list[int]) -> Tensor:
        if self._spare is None:  # pinned memory cannot be allocated during a capture
            raise RuntimeError(
                "two steps of one optimizer were captured in CUDA graphs without a step outside of a capture between "
                "them: capture one step per graph, and call optimizer.step() once before each capture"
            )
        host, table = self._spare
        host.copy_(torch.tensor(values))
        table.copy_(host, non_blocking=True)
        self._captured.append(self._spare)
        self._spare = None
        return table

    def _empty(self) -> Tensor:
        return torch.zeros(self._size, dtype=torch.int64, device=self._device)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self._size, dtype=torch.int64, pin_memory=self._device.type == "cuda"), self._empty()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Launch:
    """The tables and buffers that all launches of a plan share."""

    def __init__(self, loops: Sequence[tuple[Loop, Placement]], grad: torch.dtype, device: torch.device) -> None:
        if _capturing(device):
            raise RuntimeError(
                "the tensors of this step have a different form than those of the step before, and no plan can be made "
                "while a CUDA graph is captured: call optimizer.step() once with such tensors before the capture"
            )
        self.device = device
        tables = divide(loops, grad.itemsize)
        self.n_parameters, self.n_pieces, self.n_counters = len(loops), len(tables.pieces), tables.counters
        self.parameters, self.pieces = tables.parameters.to(device), tables.pieces.to(device)
        self.progress = torch.zeros(2 + tables.counters, dtype=torch.int32, device=device)
        self.partials = torch.empty(max(1, tables.slots), dtype=torch.float32, device=device)
        self.pointers = _PointerTable(device, POINTERS * len(loops))
        self.beside = columns_beside(grad.itemsize)
        self.options = {"num_warps": WARPS}
        if device.type == "cuda":
            self.options["maxnreg"] = REGISTERS
        self.stream = None if device.type != "cuda" else torch.cuda.current_stream(device)

    def __call__(
        self,
        pointers: list[int],
        rule: UpdateRule | Operation,
        placement: Placement,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        coefficients: DeviceCoefficients = _NO_COEFFICIENTS,
        fresh: Tensor | None = None,
        means: Tensor | None = None,
    ) -> None:
        """Launch the kernel (see step.py).

        Args:
            pointers: `POINTERS` columns.
            rule, placement: select the variant of the kernel.
            types: of the weights, the gradients and the states.
            coefficients: of the update rule.
            fresh: with dampening, which momentum buffers are new.
            means: written by MEANS, read by RESTORE.
        """
        if self.n_pieces == 0:
            return
        with self._on_device():
            table, aligned = self.pointers.uploaded(pointers)
            lr = coefficients.lr
            on_device = isinstance(lr, Tensor) and lr.device == self.device
            run[(self.n_pieces,)](
                table,
                self.parameters,
                self.pieces,
                self.progress,
                self.partials,
                self.partials if means is None else means,
                fresh,
                lr if on_device else None,
                _on(self.device, coefficients.grad_scale),
                _on(self.device, coefficients.found_inf),
                self.n_parameters,
                self.n_counters,
                0.0 if on_device else float(lr),
                _numbers(coefficients.coefficients),
                _logarithms(coefficients.coefficients) if rule > UpdateRule.MOMENTUM else (0.0, 0.0, 0.0, 0.0),
                RULE=int(rule),
                PLACEMENT=int(placement),
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

            with numpy.errstate(all="ignore"):  # the interpreter computes with NumPy, which warns of infinities
                yield
            return
        current = torch.cuda.current_stream(self.device)
        if current != self.stream and not torch.cuda.is_current_stream_capturing():
            for tensor in (self.parameters, self.pieces, self.progress, self.partials):
                tensor.record_stream(current)
        elsewhere = torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if elsewhere else nullcontext():
            yield


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return number if number is None or number.device == device else number.to(device, non_blocking=True)


def _numbers(c: Coefficients) -> tuple[float, ...]:
    """The coefficients in the order in which the kernel unpacks them; those of d and m in Δw are without the lr."""
    of_d, of_m = -1.0, -1.0
    if c.momentum != 0:
        of_d, of_m = -float(c.nesterov), -(c.momentum if c.nesterov else 1.0)
    adam = (1 - c.beta1, c.beta2, 1 - c.beta2, c.epsilon)
    return (c.scale, c.l2, c.decay, c.momentum, c.keep, of_d, of_m, *adam)


def _logarithms(c: Coefficients) -> tuple[float, ...]:
    """ln β₁ and ln β₂, each as the sum of two f32, because kernel arguments cannot be f64."""
    parts: list[float] = []
    for beta in (c.beta1, c.beta2):
        whole = math.log(beta) if beta > 0 else -math.inf
        upper = c_float(whole).value
        parts += [upper, whole - upper if math.isfinite(whole) else 0.0]
    return tuple(parts)


class TritonStepPlan(BaseStepPlan):
    """One fused step of parameters that share their device, dtypes and update rule, in one launch."""

    # A step must not cost the host more time than the device, so only what can differ is compared: torch itself
    # ensures that a gradient has the shape and the device of its parameter.
    gradient_properties = (Tensor.numel, Tensor.stride, attrgetter("dtype"), type, Tensor.is_neg)
    parameter_properties = (Tensor.stride,)
    lasting_properties = ()

    def _prepare(self, grads: list[Tensor], loops: list[tuple[Loop, Placement]]) -> None:
        weight = self.params[0]
        state = weight.dtype if self.states.momentum is None else self.states.momentum[0].dtype
        self._types = (weight.dtype, grads[0].dtype, state)
        self._placement = max((placement for _, placement in loops), default=Placement.PLAIN) or Placement.GRADIENT
        self.launch = _Launch(loops, grads[0].dtype, weight.device)
        self._fresh = torch.zeros(len(loops), dtype=torch.int32, device=weight.device)

    def run(self, grads: list[Tensor], coefficients: DeviceCoefficients, fresh: list[bool]) -> None:
        """Take the step (see `BaseStepPlan.run`) on the current stream, without synchronizing the host."""
        dampened = self.rule == UpdateRule.MOMENTUM and coefficients.coefficients.keep != 1
        if dampened and any(fresh):
            self._fresh.copy_(torch.tensor(fresh))
        flags = self._fresh if dampened else None
        self.launch(self._pointers(grads), self.rule, self._placement, self._types, coefficients, flags)
        torch.autograd.graph.increment_version(self.params)


class TritonCenteringPlan(BaseCenteringPlan):
    """Φ, means (in f32) and their restoration for many tensors of one device and dtype, each in one launch."""

    properties = (Tensor.size, Tensor.stride, attrgetter("dtype"), Tensor.get_device, type, Tensor.is_neg)
    means_dtype = torch.float32

    def _prepare(self, tensors: list[Tensor], loops: list[Loop]) -> None:
        dtype = tensors[0].dtype
        self._types = (dtype, dtype, dtype)
        self.launch = _Launch([(loop, Placement.GRADIENT) for loop in loops], dtype, self._device)

    def _run(self, pointers: list[int], operation: Operation, means: Tensor | None) -> None:
        self.launch(pointers, operation, Placement.GRADIENT, self._types, means=means)


StepPlan = TritonStepPlan
CenteringPlan = TritonCenteringPlan
