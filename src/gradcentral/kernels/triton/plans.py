"""Plans for CUDA devices: the tables of one launch, kept on the device while the tensors keep their form.

Every call reads the pointers and uploads them if one has changed, without synchronizing the host.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_float
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from gradcentral.kernels.forms import (
    POINTERS,
    BasePlan,
    Coefficients,
    DeviceCoefficients,
    Operation,
    PlacedLoops,
    Placement,
    UpdateRule,
)
from gradcentral.kernels.triton.division import TILE, divide, elements_beside
from gradcentral.kernels.triton.interpreter import INTERPRETED
from gradcentral.kernels.triton.step import run
from gradcentral.projection import Strength

__all__ = ["TritonPlan"]

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,  # see rules.py
}
_HERE = nullcontext()

_captured: list[tuple[object, ...]] = []
"""The tables of captured steps, which every replay reads, even after the plan has been replaced. They are kept forever,
because nothing tells when a CUDA graph is destroyed."""
WARPS, REGISTERS = 4, 64
"""Warps per program and registers per thread: so few that four programs share a multiprocessor and hide latency."""


class _PointerTable:
    """The pointers of a launch, in a table on the device.

    While a CUDA graph is captured, the upload is captured too, and every replay repeats it from the same pinned memory.
    A captured step therefore has its own table, which later steps do not change.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device, self._size = device, size
        self._values: Sequence[int] = ()
        self._aligned = True
        self._current = self._empty()
        self._spare: tuple[Tensor, Tensor] | None = self._pair()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def uploaded(self, values: Sequence[int], capturing: bool) -> tuple[Tensor, bool]:
        """Return the table with these pointers, and whether all of them are divisible by 16."""
        if capturing:
            return self._for_capture(values)
        if values != self._values:
            host = self._pinned()
            self._values, self._aligned = values[:], _fill(host, values)
            self._current.copy_(host, non_blocking=True)
        if self._spare is None:
            self._spare = self._pair()
        return self._current, self._aligned

    def _for_capture(self, values: Sequence[int]) -> tuple[Tensor, bool]:
        if self._spare is None:  # pinned memory cannot be allocated during a capture
            raise RuntimeError(
                "two steps of one optimizer were captured in CUDA graphs without a step outside a capture between "
                "them: capture one step per graph, and call optimizer.step() once before each capture"
            )
        host, table = self._spare
        aligned = _fill(host, values)
        table.copy_(host, non_blocking=True)
        self._captured.append(self._spare)
        self._spare = None
        return table, aligned

    def _empty(self) -> Tensor:
        return torch.zeros(self._size, dtype=torch.int64, device=self._device)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self._pinned(), self._empty()

    def _pinned(self) -> Tensor:
        return torch.empty(self._size, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")


def _fill(host: Tensor, values: Sequence[int]) -> bool:
    """Write pointers into a table, and return whether all of them are divisible by 16."""
    host.copy_(torch.frombuffer(array("q", values), dtype=torch.int64))
    return not bool((host & 15).any())


def _specialization(optional: Sequence[Tensor | None], constants: tuple[object, ...]) -> tuple[object, ...]:
    """Return what selects a compiled variant: dtypes and alignment of the optional tensors, and the constants."""
    return (*(t if t is None else (t.dtype, t.data_ptr() % 16) for t in optional), *constants)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return number if number is None or number.device == device else number.to(device, non_blocking=True)


def _numbers(c: Coefficients) -> tuple[float, ...]:
    """Return the coefficients in the order in which the kernel unpacks them; those of d and m in Δw omit the lr."""
    of_d, of_m = -1.0, -1.0
    if c.momentum != 0:
        of_d, of_m = -float(c.nesterov), -(c.momentum if c.nesterov else 1.0)
    adam = (1 - c.beta1, c.beta2, 1 - c.beta2, c.epsilon)
    return (c.scale, c.l2, c.decay, c.momentum, c.keep, of_d, of_m, *adam)


def _logarithms(c: Coefficients) -> tuple[float, ...]:
    """Return ln β₁ and ln β₂, each as the sum of two f32, because kernel arguments cannot be f64."""
    parts: list[float] = []
    for beta in (c.beta1, c.beta2):
        whole = math.log(beta) if beta > 0 else -math.inf
        upper = c_float(whole).value
        parts += [upper, whole - upper if math.isfinite(whole) else 0.0]
    return tuple(parts)


class TritonPlan(BasePlan):
    """Plan of one launch on the current stream, without synchronizing the host, with means in f32."""

    means_dtype = torch.float32

    def _prepare(self, grads: list[Tensor], loops: PlacedLoops) -> None:
        device = self.device
        if _capturing(device):
            raise RuntimeError(
                "the tensors of this step differ in form from those of the last step, and no plan can be created "
                "while a CUDA graph is captured: call optimizer.step() once with such tensors before the capture"
            )
        gradient = grads[0].dtype
        weight = self.params[0].dtype if self.params else gradient
        state = weight if self.states.momentum is None else self.states.momentum[0].dtype
        tables = divide(loops, gradient.itemsize)
        self._tables = (
            tables.parameters.to(device),
            tables.pieces.to(device),
            torch.zeros(2 + tables.counters, dtype=torch.int32, device=device),
            torch.empty(max(1, tables.slots), dtype=torch.float32, device=device),
            tables.taps.to(device),
        )
        self._n_pieces, self._n_counters = len(tables.pieces), tables.counters
        self._table = _PointerTable(device, POINTERS * len(loops))
        self._fresh = torch.zeros(len(loops), dtype=torch.int32, device=device)
        self._stream = None if device.type != "cuda" else driver.active.get_current_stream(device.index)
        self._constants = (
            int(max((placement for _, placement in loops), default=0)) or int(Placement.GRADIENT),
            tables.counters > 0,
            _TYPES[weight],
            _TYPES[gradient],
            _TYPES[state],
            elements_beside(gradient.itemsize),
            TILE,
        )
        self._options = {"num_warps": WARPS, **({"maxnreg": REGISTERS} if device.type == "cuda" else {})}
        # The coefficients of the last call, which rarely change, in the form that the kernel takes.
        self._coefficients = Coefficients()
        self._numbers, self._logarithms = _numbers(self._coefficients), _logarithms(self._coefficients)
        self._variants: dict[tuple[object, ...], Callable[..., None]] = {}

    def run(self, grads: list[Tensor], coefficients: DeviceCoefficients, fresh: list[bool]) -> None:
        """Take the step (see `BasePlan.run`)."""
        assert self.rule is not None, "a plan for centering takes no steps"
        dampened = self.rule == UpdateRule.MOMENTUM and coefficients.coefficients.keep != 1
        if dampened and any(fresh):
            self._fresh.copy_(torch.tensor(fresh, dtype=torch.int32, device="cpu"))
        self._launch(grads, self.rule, coefficients, self._fresh if dampened else None)
        torch.autograd.graph.increment_version(self.params)

    def _center(self, tensors: list[Tensor], operation: Operation, means: Tensor | None, strength: Strength) -> None:
        on_device = strength if isinstance(strength, Tensor) else None
        number = 1.0 if isinstance(strength, Tensor) else strength
        coefficients = DeviceCoefficients(Coefficients(strength=number), 0.0, strength=on_device)
        self._launch(tensors, operation, coefficients, None, means)

    def _launch(
        self,
        grads: list[Tensor],
        rule: UpdateRule | Operation,
        coefficients: DeviceCoefficients,
        fresh: Tensor | None,
        means: Tensor | None = None,
    ) -> None:
        if self._n_pieces == 0:
            return
        with self._on_device():
            capturing = _capturing(self.device)
            table, aligned = self._table.uploaded(self._pointers(grads), capturing)
            if capturing:
                _captured.append((self._table, self._fresh, *self._tables))
            lr = coefficients.lr
            lr_at = lr if isinstance(lr, Tensor) and lr.device == self.device else None
            optional = (
                self._tables[3] if means is None else means,
                fresh,
                lr_at,
                _on(self.device, coefficients.grad_scale),
                _on(self.device, coefficients.found_inf),
                _on(self.device, coefficients.strength),
            )
            if coefficients.coefficients != self._coefficients:
                self._coefficients = coefficients.coefficients
                self._numbers, self._logarithms = _numbers(self._coefficients), _logarithms(self._coefficients)
            numbers = (
                len(grads),
                self._n_counters,
                float(lr) if lr_at is None else 0.0,
                self._coefficients.strength,
                self._numbers,
                self._logarithms,
            )
            constants = (int(rule), fresh is not None, aligned, *self._constants)
            self._start((table, *self._tables, *optional, *numbers, *constants), _specialization(optional, constants))

    def _start(self, arguments: tuple[Any, ...], variant: tuple[object, ...]) -> None:
        """Launch the kernel, which is compiled for each variant of the arguments.

        Triton's own launch inspects all arguments each time, which takes the host longer than the rest of a step.
        """
        launch = self._variants.get(variant)
        if launch is not None:
            launch(*arguments)
            return
        compiled = run[(self._n_pieces,)](*arguments, **self._options)
        if compiled is not None:  # the interpreter does not compile
            self._variants[variant] = compiled[(self._n_pieces, 1, 1)]

    def _on_device(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            import numpy

            return numpy.errstate(all="ignore")  # the interpreter uses NumPy, which warns about infinities
        stream = driver.active.get_current_stream(self.device.index)
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            current = torch.cuda.current_stream(self.device)
            for tensor in self._tables:
                tensor.record_stream(current)
        elsewhere = torch.cuda.current_device() != self.device.index
        return torch.cuda.device(self.device) if elsewhere else _HERE
