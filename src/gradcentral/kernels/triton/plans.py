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
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradcentral.kernels.forms import same_objects
from gradcentral.kernels.loops import Loop
from gradcentral.kernels.native import MOMENTUM, Rule, same_columns
from gradcentral.kernels.triton import DeviceRule
from gradcentral.kernels.triton.division import TILE, Division, columns_beside, divide
from gradcentral.kernels.triton.rules import INTERPRETED
from gradcentral.kernels.triton.step import run
from gradcentral.weight_vectors import WeightVectors

__all__ = ["CenteringPlan", "StepPlan"]

_CENTER, _MEANS, _RESTORE = 4, 5, 6
_GRADIENT = 1
_COLUMNS = 6
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,  # see rules.py
}
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")
_NO_RULE = DeviceRule(Rule(), 0.0)
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
        division: Division = divide(loops, grad.itemsize)
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

    @property
    def memory(self) -> int:
        """Bytes on the device."""
        tables = (self.items, self.pieces, self.progress, self.partials)
        return sum(t.nbytes for t in tables) + 2 * 8 * _COLUMNS * self.n_items

    def __call__(
        self,
        pointers: list[int],
        kind: int,
        placement: int,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        rule: DeviceRule = _NO_RULE,
        fresh: Tensor | None = None,
        means: Tensor | None = None,
    ) -> None:
        if self.n_pieces == 0:
            return
        with self._on_device():
            table, aligned = self.table.uploaded(pointers)
            lr = rule.lr
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
                _on(self.device, rule.grad_scale),
                _on(self.device, rule.found_inf),
                self.n_items,
                self.n_counters,
                0.0 if on_device else float(lr),
                _coefficients(rule.rule),
                _logarithms(rule.rule) if kind > MOMENTUM else (0.0, 0.0, 0.0, 0.0),
                RULE=kind,
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


def _coefficients(rule: Rule) -> tuple[float, ...]:
    of_d, of_m = -1.0, -1.0
    if rule.momentum != 0:
        of_d, of_m = -float(rule.nesterov), -(rule.momentum if rule.nesterov else 1.0)
    return (
        rule.scale,
        rule.l2,
        rule.decay,
        rule.momentum,
        rule.keep,
        of_d,
        of_m,
        1 - rule.beta1,
        rule.beta2,
        1 - rule.beta2,
        rule.epsilon,
    )


def _logarithms(rule: Rule) -> tuple[float, ...]:
    """Of β₁ and β₂, each as the sum of two f32, for a kernel takes no f64."""
    parts: list[float] = []
    for beta in (rule.beta1, rule.beta2):
        whole = math.log(beta) if beta > 0 else -math.inf
        upper = c_float(whole).value
        parts += [upper, whole - upper if math.isfinite(whole) else 0.0]
    return tuple(parts)


class StepPlan:
    """One fused step of parameters that share their device, dtypes and rule: one launch.

    Args:
        kind: SGD, MOMENTUM, ADAM or AMSGRAD, as for the native kernels.
        params, grads: the parameters and their gradients.
        states: columns of state tensors in the order momentum, squares, largest squares, step; None where the rule
            has none.
        loops: for each parameter its loop and its placement.
    """

    def __init__(
        self,
        kind: int,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[list[Tensor] | None],
        loops: list[tuple[Loop, int]],
    ) -> None:
        self.kind = kind
        self.params = params
        self.states = states
        self._lasting = [*params, *(tensor for column in states if column is not None for tensor in column)]
        self._lasting_form = self._form_of_lasting()
        self._lasting_pointers = self._lasting_form[0]
        self._grad_form = _form_of_gradients(grads)
        state = params[0].dtype if states[0] is None else states[0][0].dtype
        self._types = (params[0].dtype, grads[0].dtype, state)
        self._placement = max((placement for _, placement in loops), default=0) or _GRADIENT
        self.launch = _Launch(loops, grads[0].dtype, params[0].device)
        self._fresh = torch.zeros(len(params), dtype=torch.int32, device=params[0].device)

    def fits(self, grads: list[Tensor], states: Sequence[list[Tensor] | None]) -> bool:
        """Whether parameters, gradients and states have the form they had when it was planned."""
        if not same_columns(states, self.states):
            return False
        form = self._form_of_lasting()
        self._lasting_pointers = form[0]
        return form == self._lasting_form and _form_of_gradients(grads) == self._grad_form

    def _form_of_lasting(self) -> tuple[list[int], list[Any]]:
        """Of parameters and states, which are the same objects: that nobody has swapped their data.

        New data has another pointer, for it was there beside the old. Parameters, with which people do such things, are
        also viewed otherwise where they lie. A step must not cost the host more than the device, so no more is asked.
        """
        return [*map(Tensor.data_ptr, self._lasting)], [*map(Tensor.stride, self.params)]

    def _pointers(self, grads: list[Tensor]) -> list[int]:
        """A column after the other: those that `fits` has just read, and the gradients'; 0 where there is none."""
        count, lasting = len(grads), self._lasting_pointers
        pointers = [*lasting[:count], *map(Tensor.data_ptr, grads)]
        position = count
        for column in self.states:
            if column is None:
                pointers += [0] * count
            else:
                pointers += lasting[position : position + count]
                position += count
        return pointers

    def run(self, grads: list[Tensor], rule: DeviceRule, new: list[bool]) -> None:
        """Take the step, right after `fits`, on the current stream; the host waits for nothing.

        Args:
            grads: the gradients.
            rule: the coefficients.
            new: which momentum buffers are new, as flags; empty for none.
        """
        dampened = self.kind == MOMENTUM and rule.rule.keep != 1
        if dampened and any(new):
            self._fresh.copy_(torch.tensor(new))
        fresh = self._fresh if dampened else None
        self.launch(self._pointers(grads), self.kind, self._placement, self._types, rule, fresh)
        torch.autograd.graph.increment_version(self.params)


class CenteringPlan:
    """Φ, means and their restoration for many tensors of one device and dtype, each in one launch."""

    def __init__(self, tensors: list[Tensor], vectors: list[WeightVectors], loops: list[Loop]) -> None:
        self.vectors = vectors
        self._form = _form(tensors)
        dtype = tensors[0].dtype
        self._types = (dtype, dtype, dtype)
        self.launch = _Launch([(loop, _GRADIENT) for loop in loops], dtype, tensors[0].device)

    def fits(self, tensors: list[Tensor], vectors: list[WeightVectors]) -> bool:
        """Whether these have the form that was planned."""
        return same_objects(vectors, self.vectors) and _form(tensors) == self._form

    def center_(self, tensors: list[Tensor]) -> None:
        """Center each tensor in place."""
        self._run(tensors, _CENTER, None)

    def means(self, tensors: list[Tensor]) -> Tensor:
        """The mean of every weight vector of every tensor, in f32, one after another."""
        means = torch.empty(self.launch.n_means, dtype=torch.float32, device=self.launch.device)
        self._run(tensors, _MEANS, means)
        return means

    def restore_(self, tensors: list[Tensor], means: Tensor) -> None:
        """Give every weight vector the mean that `means` found, by shifting it."""
        if means.numel() != self.launch.n_means:
            raise RuntimeError("the parameters changed their shapes during the step: their old means can't be restored")
        self._run(tensors, _RESTORE, means)

    def _run(self, tensors: list[Tensor], what: int, means: Tensor | None) -> None:
        pointers = [*map(Tensor.data_ptr, tensors)]
        table = [*pointers, *pointers, *[0] * ((_COLUMNS - 2) * len(pointers))]
        self.launch(table, what, _GRADIENT, self._types, means=means)
        if what != _MEANS:
            torch.autograd.graph.increment_version(tensors)


def _form_of_gradients(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a step depends on in gradients, of which torch sees to it that device and shape are their parameters'."""
    layouts = set(map(_layout, tensors))
    if layouts != {torch.strided}:  # a sparse tensor has no strides to ask for
        return (layouts,)
    return (
        layouts,
        [*map(Tensor.numel, tensors)],
        [*map(Tensor.stride, tensors)],
        [*map(_dtype, tensors)],
        set(map(type, tensors)),
        any(map(Tensor.is_neg, tensors)),
    )


def _form(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a plan depends on in tensors that are others at each call; pointers are no part of it."""
    layouts = set(map(_layout, tensors))
    if layouts != {torch.strided}:  # a sparse tensor has no strides to ask for
        return (layouts,)
    return (
        layouts,
        [*map(Tensor.size, tensors)],
        [*map(Tensor.stride, tensors)],
        [*map(_dtype, tensors)],
        [*map(Tensor.get_device, tensors)],
        [*map(type, tensors)],
        any(map(Tensor.is_neg, tensors)),
    )
