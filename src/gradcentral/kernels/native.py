"""The C kernels through ctypes: what they can serve, the cached layout of the work, and the calls.

A plan keeps shapes, strides and the division of the work, which change rarely and are compared at every call.
Pointers are never kept: every call reads them anew from the tensors it is given.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int32, c_int64, c_uint64, c_void_p
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.forms import same_objects
from gradcentral.kernels.loops import Loop, loop_over
from gradcentral.weight_vectors import WeightVectors

__all__ = [
    "CenteringPlan",
    "Rule",
    "StepPlan",
    "alike",
    "is_plain",
    "lies_as",
    "loop_of",
    "same_columns",
    "stream",
    "unavailable",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
PLACEMENTS = {None: 0, "gradient": 1, "update": 2}
SGD, MOMENTUM, ADAM, AMSGRAD = range(4)
_CENTER, _MEANS, _RESTORE = range(3)
_POINTERS = 6


class _Item(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("group", "a", "unit", "b")),
        *((name, c_int32) for name in ("placement", "first", "step_is_f64", "blocks")),
        ("scratch", c_int64),
        *((name, c_void_p) for name in ("w", "g", "m", "v", "x")),
        *((name, c_double) for name in ("step_size", "root_correction")),
        *((name, c_void_p) for name in ("sums", "means")),
        ("missing", c_int64),
    )


class _Piece(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("item", "begin", "end", "kind"))


class _List(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("pieces", "batches", "waves")),
        *((name, c_int64) for name in ("n_batches", "n_waves")),
        ("scratch", c_void_p),
    )


class Rule(ctypes.Structure):
    """The coefficients of an update rule, as in kernels.h."""

    _fields_ = tuple(
        (name, c_double)
        for name in ("lr", "l2", "decay", "momentum", "keep", "nesterov", "beta1", "beta2", "epsilon", "scale")
    )


def _load() -> tuple[Any, str]:
    """The library, or why there is none."""
    found = sorted(Path(__file__).parent.glob("_native.*"))
    if not found:
        return None, "not built: no C compiler was found when gradcentral was installed"
    try:
        library = ctypes.CDLL(str(found[0]))
        sizes = [library.gradcentral_sizes(which) for which in range(4)]
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} does not load: {error}"
    if sizes != [ctypes.sizeof(kind) for kind in (_Item, _Piece, Rule, _List)]:
        return None, f"{found[0].name} is of another version: install gradcentral again"
    library.gradcentral_plan.restype = None
    library.gradcentral_plan.argtypes = [c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_void_p]
    work: list[Any] = [c_void_p, c_int64, c_void_p, POINTER(_List), c_int32, c_int32]
    library.gradcentral_step.restype = None
    library.gradcentral_step.argtypes = [*work, POINTER(Rule), c_int32]
    library.gradcentral_center.restype = None
    library.gradcentral_center.argtypes = [*work, c_void_p, c_void_p, c_int32]
    library.gradcentral_stream.restype = None
    library.gradcentral_stream.argtypes = [c_void_p, c_void_p, c_int64, c_int32, c_uint64, c_int32]
    return library, ""


_library, unavailable = _load()
if unavailable == "" and os.environ.get("GRADCENTRAL_KERNELS") == "reference":
    unavailable = "GRADCENTRAL_KERNELS=reference"


def has_openmp() -> bool:
    """Whether the library was built to run on several threads."""
    return bool(_library is not None and _library.gradcentral_has_openmp())


def loop_of(tensor: Tensor, vectors: WeightVectors | None) -> Loop | None:
    """The loop over a tensor that the kernels can serve, or None: a plain dense CPU tensor of a type they know.

    Without vectors every element is one of its own.
    """
    if not is_plain(tensor) or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        return None
    return loop_over(vectors, tensor.shape, tensor.stride())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds just its elements: no subclass, not sparse, no lazy negation."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()


def alike(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether a gradient or state tensor lies in memory as its parameter does, in the same type."""
    return lies_as(parameter, tensor) and tensor.dtype == parameter.dtype


def lies_as(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor lies in memory as a parameter does, so that one loop serves both."""
    return (
        is_plain(tensor)
        and tensor.device == parameter.device
        and tensor.shape == parameter.shape
        and all(
            size == 1 or one == other
            for size, one, other in zip(tensor.shape, tensor.stride(), parameter.stride(), strict=True)
        )
    )


is_state = alike
"""Whether a state tensor lies in memory as its parameter does, in a type that the kernels keep state in."""


def is_number(tensor: object, device: torch.device) -> bool:
    """Whether this is one real number in the device's memory, as torch keeps its step counters."""
    return (
        type(tensor) is Tensor
        and tensor.numel() == 1
        and tensor.device == device
        and tensor.dtype in (torch.float32, torch.float64)
    )


def same_columns(states: Sequence[list[Tensor] | None], others: Sequence[list[Tensor] | None]) -> bool:
    """Whether two tables of states hold the very same tensors, and none where the other has none."""
    for one, other in zip(states, others, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and not same_objects(one, other)):
            return False
    return True


class Work:
    """Items with these loops and placements, and how the work on them is divided.

    Args:
        loops: for each tensor its loop and its placement (one of `PLACEMENTS`' values).
        dtype: one of `DTYPES`' values.
        with_scratch: whether to take the memory for the sums of columns, without which nothing can be run.
    """

    def __init__(self, loops: Sequence[tuple[Loop, int]], dtype: int, with_scratch: bool = True) -> None:
        self.items = (_Item * len(loops))()
        for item, (loop, placement) in zip(self.items, loops, strict=True):
            item.group, item.a, item.unit, item.b = loop
            item.placement = placement
        counts = (c_int64 * 4)()
        _library.gradcentral_plan(self.items, len(loops), dtype, None, None, None, counts)
        n_pieces, n_batches, n_waves, scratch = counts
        self.pieces = (_Piece * n_pieces)()
        self.batches, self.waves = (c_int64 * (n_batches + 1))(), (c_int64 * (n_waves + 1))()
        _library.gradcentral_plan(self.items, len(loops), dtype, self.pieces, self.batches, self.waves, counts)
        self.scratch_bytes = scratch
        self.scratch = torch.empty(scratch if with_scratch else 0, dtype=torch.uint8)
        pointers = [ctypes.addressof(array_) for array_ in (self.pieces, self.batches, self.waves)]
        self._list = _List(*pointers, n_batches, n_waves, self.scratch.data_ptr())

    def arguments(self, table: array[int]) -> tuple[Any, ...]:
        """What every call begins with: items, pointers and the division."""
        return self.items, len(self.items), table.buffer_info()[0], ctypes.byref(self._list)


_dtype, _is_cpu, _layout = attrgetter("dtype"), attrgetter("is_cpu"), attrgetter("layout")


class _Form(NamedTuple):
    """What a plan depends on in tensors that are others at each call; pointers are no part of it."""

    layouts: set[torch.layout]
    shapes: list[Any]
    strides: list[Any]
    dtypes: list[Any]
    kinds: list[Any]
    on_cpu: bool
    negated: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Form:
        layouts = set(map(_layout, tensors))
        if layouts != {torch.strided}:  # a sparse tensor has no strides to ask for
            return cls(layouts, [], [], [], [], False, False)
        return cls(
            layouts,
            [*map(Tensor.size, tensors)],
            [*map(Tensor.stride, tensors)],
            [*map(_dtype, tensors)],
            [*map(type, tensors)],
            all(map(_is_cpu, tensors)),
            any(map(Tensor.is_neg, tensors)),
        )


def _pointers(columns: Sequence[Sequence[Tensor] | None], count: int) -> array[int]:
    """The table of pointers, a column after the other, with zeros where the rule has no such tensor."""
    table = array("Q")
    for column in columns:
        table.extend(repeat(0, count) if column is None else map(Tensor.data_ptr, column))
    return table


class StepPlan:
    """One fused step of parameters that share their dtype and rule.

    Args:
        kind: SGD, MOMENTUM, ADAM or AMSGRAD.
        params, grads: the parameters and their gradients.
        states: columns of state tensors in the order momentum, squares, largest squares, step; None where the rule
            has none.
        loops: for each parameter its loop and its placement (one of `PLACEMENTS`' values).
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
        self._dtype = DTYPES[params[0].dtype]
        self._lasting = [*params, *(tensor for column in states if column is not None for tensor in column)]
        self._lasting_form = self._form_of_lasting()
        self._lasting_pointers = self._lasting_form[0]
        self._grad_form = _Form.of(grads)
        self.work = Work(loops, self._dtype)
        steps = states[3]
        for position, item in enumerate(self.work.items):
            item.step_is_f64 = steps is not None and steps[position].dtype == torch.float64

    def fits(self, grads: list[Tensor], states: Sequence[list[Tensor] | None]) -> bool:
        """Whether parameters, gradients and states have the form they had when it was planned."""
        if not same_columns(states, self.states):
            return False
        form = self._form_of_lasting()
        self._lasting_pointers = form[0]
        return form == self._lasting_form and _Form.of(grads) == self._grad_form

    def _table(self, grads: list[Tensor]) -> array[int]:
        """The table of pointers: those that `fits` has just read, and the gradients'."""
        count, lasting = len(grads), self._lasting_pointers
        table = array("Q", lasting[:count])
        table.extend(map(Tensor.data_ptr, grads))
        position = count
        for column in self.states:
            if column is None:
                table.extend(repeat(0, count))
            else:
                table.extend(lasting[position : position + count])
                position += count
        return table

    def _form_of_lasting(self) -> tuple[list[int], list[int], list[Any], list[Any], list[Any]]:
        """Of parameters and states, which are the same objects: that nobody has swapped their data.

        Where pointer, size and type are the old ones, the memory is as large as it was. Of the parameters, with which
        people do such things, the shape is looked at too.
        """
        return (
            [*map(Tensor.data_ptr, self._lasting)],
            [*map(Tensor.numel, self._lasting)],
            [*map(_dtype, self._lasting)],
            [*map(Tensor.size, self.params)],
            [*map(Tensor.stride, self.params)],
        )

    def run(self, grads: list[Tensor], rule: Rule, new: list[bool]) -> None:
        """Take the step, right after `fits`. ``new``: which momentum buffers are new, as flags; empty for none."""
        for item, first in zip(self.work.items, new, strict=False):
            item.first = first
        table = self._table(grads)
        _library.gradcentral_step(
            *self.work.arguments(table), self._dtype, self.kind, ctypes.byref(rule), torch.get_num_threads()
        )
        for item, _ in zip(self.work.items, new, strict=False):
            item.first = 0
        torch.autograd.graph.increment_version(self.params)


class CenteringPlan:
    """Φ, means and their restoration for many tensors of one dtype in one call."""

    def __init__(self, tensors: list[Tensor], vectors: list[WeightVectors], loops: list[Loop]) -> None:
        self.vectors = vectors
        self._dtype = DTYPES[tensors[0].dtype]
        self._form = _Form.of(tensors)
        self.work = Work([(loop, PLACEMENTS["gradient"]) for loop in loops], self._dtype)
        counts = [loop.group * loop.unit for loop in loops]
        self._total = sum(counts)
        self._first_mean = array("q", [sum(counts[:position]) for position in range(len(counts))])

    def fits(self, tensors: list[Tensor], vectors: list[WeightVectors]) -> bool:
        """Whether these have the form that was planned."""
        return same_objects(vectors, self.vectors) and _Form.of(tensors) == self._form

    def center_(self, tensors: list[Tensor]) -> None:
        """Center each tensor in place."""
        self._run(tensors, _CENTER, None)

    def means(self, tensors: list[Tensor]) -> Tensor:
        """The mean of every weight vector of every tensor, in double, one after another."""
        means = torch.empty(self._total, dtype=torch.float64)
        self._run(tensors, _MEANS, means)
        return means

    def restore_(self, tensors: list[Tensor], means: Tensor) -> None:
        """Give every weight vector the mean that `means` found, by shifting it."""
        if means.numel() != self._total:
            raise RuntimeError("the parameters changed their shapes during the step: their old means can't be restored")
        self._run(tensors, _RESTORE, means)

    def _run(self, tensors: list[Tensor], what: int, means: Tensor | None) -> None:
        table = _pointers((tensors, None, None, None, None, None), len(tensors))
        _library.gradcentral_center(
            *self.work.arguments(table),
            self._dtype,
            what,
            None if means is None else means.data_ptr(),
            None if means is None else self._first_mean.buffer_info()[0],
            torch.get_num_threads(),
        )
        if what != _MEANS:
            torch.autograd.graph.increment_version(tensors)


def stream(params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]]) -> None:
    """Read and write the memory that a step touches and compute nothing: what to measure a step against.

    With states reads grads and writes params and states; without any reads and writes params alone. No value changes.
    """
    columns: list[list[Tensor] | None] = [params, grads, *states]
    table = _pointers([*columns, *[None] * (_POINTERS - len(columns))], len(params))
    sizes = array("q", [p.numel() * p.itemsize for p in params])
    _library.gradcentral_stream(
        table.buffer_info()[0], sizes.buffer_info()[0], len(params), len(states), 0, torch.get_num_threads()
    )
