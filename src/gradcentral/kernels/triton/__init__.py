"""Kernels in Triton for CUDA devices: one launch for all parameters of a step.

The interface is that of the native kernels. Triton is imported when the first plan is created. With
``TRITON_INTERPRET=1`` and ``GRADCENTRAL_KERNELS=triton`` in the environment, Triton's interpreter processes CPU tensors
instead, which is slow and meant for tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels.forms import all_match, is_counter
from gradcentral.kernels.triton.interpreter import INTERPRETED

__all__ = ["INTERPRETED", "accepts", "serves", "serves_cpu", "unavailable_reason"]

_OLDEST = (3, 4)

MOST_TAPS = 64
"""Largest ``inner`` of a loop that these kernels accept: a unit must fit the columns that a program takes."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the tensors that these kernels accept."""

_choice = os.environ.get("GRADCENTRAL_KERNELS", "")
serves_cpu = INTERPRETED and _choice == "triton"
"""Whether these kernels process CPU tensors, in Triton's interpreter."""


def _static_reason() -> str:
    if _choice == "reference":
        return "GRADCENTRAL_KERNELS=reference"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install gradcentral[triton]"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # another build of Triton, under another name
        version = ""
    if version and tuple(map(int, version.split(".")[:2])) < _OLDEST:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, _OLDEST))}' (torch 2.8 or later)"
    if torch.version.hip is not None:
        return "torch is built for ROCm, on which these kernels are not tested"
    if INTERPRETED and not serves_cpu:
        return "TRITON_INTERPRET is set: unset it, or set GRADCENTRAL_KERNELS=triton too"
    return ""


_unavailable = _static_reason()
"""The reason why no tensor can be processed; computed once, because `serves` is called for every tensor."""


def unavailable_reason() -> str:
    """Return the reason why these kernels cannot be used on this machine; empty if they can."""
    if _unavailable or serves_cpu or torch.cuda.is_available():
        return _unavailable
    return "no CUDA device"


def serves(tensor: Tensor) -> bool:
    """Return whether these kernels process tensors on this tensor's device."""
    return not _unavailable and (tensor.device.type == "cpu" if serves_cpu else tensor.is_cuda)


def accepts(parameter: Tensor, gradient: Tensor, buffers: Sequence[Tensor], counter: Tensor | None) -> bool:
    """Return whether these kernels can update a parameter with this gradient and state, whose dtypes may differ.

    State must be f32 or bf16, because in f16 small squares underflow; a step counter must be f32, as in torch's fused
    optimizers.
    """
    return (
        all_match(parameter, [gradient], DTYPES)
        and all_match(parameter, buffers, (torch.float32, torch.bfloat16))
        and is_counter(counter, parameter.device, (torch.float32,))
    )


def __getattr__(name: str) -> Any:
    if name == "Plan":
        from gradcentral.kernels.triton.plans import TritonPlan

        return TritonPlan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
