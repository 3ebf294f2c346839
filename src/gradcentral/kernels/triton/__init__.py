"""Kernels in Triton for CUDA devices: one launch for all parameters of a step.

Same interface as the native kernels. Triton is imported when the first plan is made. With ``TRITON_INTERPRET=1`` and
``GRADCENTRAL_KERNELS=triton`` in the environment, Triton's interpreter serves CPU tensors instead: slow, for tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.forms import Coefficients, is_plain, same_strides
from gradcentral.kernels.loops import Loop, loop_over
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from gradcentral.kernels.triton.plans import CenteringPlan, StepPlan

__all__ = [
    "INTERPRETED",
    "CenteringPlan",
    "DeviceCoefficients",
    "StepPlan",
    "accepts_counter",
    "accepts_gradient",
    "accepts_state",
    "loop_of",
    "serves",
    "serves_cpu",
    "unavailable_reason",
]

_OLDEST = (3, 4)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice = os.environ.get("GRADCENTRAL_KERNELS", "")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton, which reads the same variable when it is imported, runs every kernel on the CPU in Python."""

serves_cpu = INTERPRETED and _choice == "triton"
"""Whether these kernels serve CPU tensors, by Triton's interpreter."""


class DeviceCoefficients(NamedTuple):
    """Coefficients of which some may be on the device, where the kernel reads them without synchronizing the host."""

    coefficients: Coefficients
    """For a learning rate of 1 and unscaled gradients."""
    lr: float | Tensor
    grad_scale: Tensor | None = None
    """Set by a GradScaler on fused optimizers: the gradients are divided by it."""
    found_inf: Tensor | None = None
    """Set by a GradScaler on fused optimizers: if it is not 0, the step changes nothing."""


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
"""Why no tensor can be served, whatever its device; computed once because `serves` is called for every tensor."""


def unavailable_reason() -> str:
    """Why these kernels cannot be used on this machine; empty if they can."""
    if _unavailable or serves_cpu or torch.cuda.is_available():
        return _unavailable
    return "no CUDA device"


def serves(tensor: Tensor) -> bool:
    """Whether these kernels are for tensors on this one's device."""
    return not _unavailable and (tensor.device.type == "cpu" if serves_cpu else tensor.is_cuda)


def loop_of(tensor: Tensor, vectors: WeightVectors | None) -> Loop | None:
    """The loop over a tensor, or None unless it is a plain dense tensor of f32, bf16 or f16 on a served device.

    Args:
        tensor: the tensor.
        vectors: its weight vectors; None if it is not centered.
    """
    if not is_plain(tensor) or tensor.dtype not in DTYPES or not serves(tensor):
        return None
    return loop_over(vectors, tensor.shape, tensor.stride())


def accepts_gradient(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether a gradient has the strides of its parameter; its dtype may differ."""
    return same_strides(parameter, gradient) and gradient.dtype in DTYPES


def accepts_state(parameter: Tensor, state: Tensor) -> bool:
    """Whether a state tensor has the strides of its parameter and is f32 or bf16: in f16 small squares underflow."""
    return accepts_gradient(parameter, state) and state.dtype != torch.float16


def accepts_counter(tensor: object, device: torch.device) -> bool:
    """Whether this is a step counter as torch's fused optimizers keep them: one f32 number on the device."""
    return type(tensor) is Tensor and tensor.numel() == 1 and tensor.device == device and tensor.dtype == torch.float32


def __getattr__(name: str) -> Any:
    if name in ("CenteringPlan", "StepPlan"):
        from gradcentral.kernels.triton import plans

        return getattr(plans, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
