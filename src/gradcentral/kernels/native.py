"""The C kernels for the CPU, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels.forms import (
    POINTERS,
    BasePlan,
    Coefficients,
    Operation,
    PlacedLoops,
    UpdateRule,
    all_match,
    is_counter,
)
from gradcentral.kernels.loops import Loop
from gradcentral.projection import Strength

__all__ = [
    "Plan",
    "WorkList",
    "accepts",
    "has_openmp",
    "serves",
    "stream",
    "unavailable_reason",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
MOST_TAPS = sys.maxsize
"""Largest ``inner`` of a loop that these kernels accept."""


# Structures of c/kernels.h.


class _CParameter(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("groups", "outer", "units", "inner", "phases")),
        ("same_as", c_void_p),
        *((name, c_int32) for name in ("placement", "fresh", "step_is_f64", "blocks")),
        ("scratch", c_int64),
        *((name, c_void_p) for name in ("w", "g", "m", "v", "x")),
        *((name, c_double) for name in ("step_size", "root_correction")),
        *((name, c_void_p) for name in ("sums", "means", "kept")),
        ("missing", c_int64),
    )


class _CWorkPiece(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("parameter", "begin", "end", "kind"))


class _CWorkList(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("pieces", "batches", "waves")),
        *((name, c_int64) for name in ("n_batches", "n_waves")),
        ("scratch", c_void_p),
    )


class _CCoefficients(ctypes.Structure):
    _fields_ = tuple((name, c_double) for name in Coefficients._fields)


def _load(folder: Path) -> tuple[Any, str]:
    """Load the library in a folder; return None and the reason if it cannot be used."""
    found = sorted(folder.glob("_native.*"))
    if not found:
        reason = folder / "not_built.txt"  # written by setup.py
        why = f", because {reason.read_text(encoding='utf-8')}" if reason.exists() else ""
        return None, f"not built{why}: install a working C compiler and reinstall gradcentral"
    try:
        library = ctypes.CDLL(str(found[0]))
        sizes = [library.gradcentral_struct_size(which) for which in range(4)]
    except (OSError, AttributeError) as error:
        if "GOMP_" in str(error):  # GCC's OpenMP functions; setup.py explains why the library does not bring them
            return None, f"{found[0].name} needs an OpenMP runtime, and this build of torch has loaded none"
        return None, f"{found[0].name} does not load ({error}): reinstall gradcentral"
    if sizes != [ctypes.sizeof(kind) for kind in (_CParameter, _CWorkPiece, _CCoefficients, _CWorkList)]:
        return None, f"{found[0].name} belongs to another version: reinstall gradcentral"
    library.gradcentral_plan.restype = None
    library.gradcentral_plan.argtypes = [c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_void_p]
    work: list[Any] = [c_void_p, c_int64, c_void_p, POINTER(_CWorkList), c_int32]
    library.gradcentral_run.restype = None
    library.gradcentral_run.argtypes = [*work, c_int32, POINTER(_CCoefficients), c_void_p, c_int32]
    library.gradcentral_stream.restype = None
    library.gradcentral_stream.argtypes = [c_void_p, c_void_p, c_int64, c_int32, c_uint64, c_int32]
    return library, ""


_library, _unavailable = _load(Path(__file__).parent)
if _unavailable == "" and os.environ.get("GRADCENTRAL_KERNELS") == "reference":
    _unavailable = "GRADCENTRAL_KERNELS=reference"


def unavailable_reason() -> str:
    """Return the reason why these kernels cannot be used; empty if they can."""
    return _unavailable


def has_openmp() -> bool:
    """Return whether the library was built to run on several threads."""
    return bool(_library is not None and _library.gradcentral_has_openmp())


def serves(tensor: Tensor) -> bool:
    """Return whether these kernels process tensors on this tensor's device."""
    return tensor.is_cpu and not _unavailable


def accepts(parameter: Tensor, gradient: Tensor, buffers: Sequence[Tensor], counter: Tensor | None) -> bool:
    """Return whether these kernels can update a parameter with this gradient and state.

    All must have one dtype. A step counter, if there is one, must be f32 or f64.
    """
    return all_match(parameter, [gradient, *buffers], (parameter.dtype,)) and is_counter(
        counter, parameter.device, (torch.float32, torch.float64)
    )


class WorkList:
    """The work on parameters with these loops and placements, divided into pieces (see c/work_list.h).

    Args:
        loops: the loop and the placement of each parameter.
        dtype: one of the values of `DTYPES`.
        with_scratch: whether to allocate the memory for column sums, which running the work requires.
    """

    def __init__(self, loops: Sequence[tuple[Loop, int]], dtype: int, with_scratch: bool = True) -> None:
        self.parameters = (_CParameter * len(loops))()
        self._same_as: list[array[int]] = []
        for parameter, (loop, placement) in zip(self.parameters, loops, strict=True):
            parameter.groups, parameter.outer, parameter.units, parameter.inner = loop
            parameter.phases = loop.phases
            if loop.taps:
                self._same_as.append(array("q", loop.first_of_phase()))
                parameter.same_as = self._same_as[-1].buffer_info()[0]
            parameter.placement = placement
        counts = (c_int64 * 4)()
        _library.gradcentral_plan(self.parameters, len(loops), dtype, None, None, None, counts)
        n_pieces, n_batches, n_waves, self.scratch_bytes = counts
        self.pieces = (_CWorkPiece * n_pieces)()
        self.batches, self.waves = (c_int64 * (n_batches + 1))(), (c_int64 * (n_waves + 1))()
        _library.gradcentral_plan(self.parameters, len(loops), dtype, self.pieces, self.batches, self.waves, counts)
        self._scratch = torch.empty(self.scratch_bytes if with_scratch else 0, dtype=torch.uint8, device="cpu")
        pointers = [ctypes.addressof(numbers) for numbers in (self.pieces, self.batches, self.waves)]
        self._list = _CWorkList(*pointers, n_batches, n_waves, self._scratch.data_ptr())
        self._dtype = dtype
        # The coefficients of the last call, since creating a C structure takes longer than comparing them.
        self._coefficients = Coefficients()
        self._in_c = _CCoefficients(*self._coefficients)

    def run(
        self,
        pointers: array[int],
        rule: UpdateRule | Operation,
        coefficients: Coefficients,
        means: Tensor | None = None,
    ) -> None:
        """Update the tensors at these pointers by one step, or center them."""
        if coefficients != self._coefficients:
            self._coefficients, self._in_c = coefficients, _CCoefficients(*coefficients)
        _library.gradcentral_run(
            self.parameters,
            len(self.parameters),
            pointers.buffer_info()[0],
            self._list,
            self._dtype,
            rule,
            self._in_c,
            None if means is None else means.data_ptr(),
            torch.get_num_threads(),
        )


class NativePlan(BasePlan):
    """Plan of one call of the library, with means in f64."""

    means_dtype = torch.float64

    def _prepare(self, grads: list[Tensor], loops: PlacedLoops) -> None:
        self.work = WorkList(loops, DTYPES[grads[0].dtype])
        for parameter, counter in zip(self.work.parameters, self.states.steps or (), strict=False):
            parameter.step_is_f64 = counter.dtype == torch.float64

    def run(self, grads: list[Tensor], coefficients: Coefficients, fresh: list[bool]) -> None:
        """Take the step (see `BasePlan.run`)."""
        assert self.rule is not None, "a plan for centering takes no steps"
        if fresh:
            self._mark(fresh)
        self.work.run(self._pointers(grads), self.rule, coefficients)
        if fresh:
            self._mark([False] * len(fresh))
        torch.autograd.graph.increment_version(self.params)

    def _mark(self, fresh: list[bool]) -> None:
        for parameter, is_fresh in zip(self.work.parameters, fresh, strict=True):
            parameter.fresh = is_fresh

    def _center(self, tensors: list[Tensor], operation: Operation, means: Tensor | None, strength: Strength) -> None:
        self.work.run(self._pointers(tensors), operation, Coefficients(strength=float(strength)), means)


Plan = NativePlan


def stream(params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]]) -> None:
    """Read and write the memory that a step touches, without computing: a lower bound of a step's time.

    With states, it reads gradients, and reads and writes parameters and states; without states, it reads and writes
    only parameters. No value changes.
    """
    columns = [params, grads, *states]
    pointers = array("Q", [tensor.data_ptr() for column in columns for tensor in column])
    pointers.extend([0] * (len(params) * (POINTERS - len(columns))))
    sizes = array("q", [p.numel() * p.itemsize for p in params])
    addresses = pointers.buffer_info()[0], sizes.buffer_info()[0]
    _library.gradcentral_stream(*addresses, len(params), len(states), 0, torch.get_num_threads())
