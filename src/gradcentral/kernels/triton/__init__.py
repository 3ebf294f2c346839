"""Kernels in Triton for CUDA devices: one launch for all parameters of a step.

Same interface as the native kernels. Triton is imported when the first plan is made. With ``TRITON_INTERPRET=1`` and
``GRADCENTRAL_KERNELS=triton`` in the environment, Triton's interpreter serves CPU tensors instead: slow, and good for
tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.kernels.loops import Loop, loop_over
from gradcentral.kernels.native import Rule, is_plain, lies_as
from gradcentral.weight_vectors import WeightVectors

if TYPE_CHECKING:
    from gradcentral.kernels.triton.plans import CenteringPlan, StepPlan

__all__ = [
    "CenteringPlan",
    "DeviceRule",
    "StepPlan",
    "alike",
    "interpreted",
    "is_number",
    "is_state",
    "loop_of",
    "missing",
    "serves",
    "unavailable",
]

_OLDEST = (3, 4)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice = os.environ.get("GRADCENTRAL_KERNELS", "")
_interpret = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

interpreted = _interpret and _choice == "triton"
"""Whether CPU tensors are served, by Triton's interpreter."""


class DeviceRule(NamedTuple):
    """Coefficients of which some may be on the device, where the kernel reads them and the host waits for nothing."""

    rule: Rule
    """For a learning rate of 1 and gradients that are not scaled."""
    lr: float | Tensor
    grad_scale: Tensor | None = None
    """What a GradScaler gives to fused optimizers: the gradients are divided by it."""
    found_inf: Tensor | None = None
    """Likewise: where it is not 0, the step changes nothing."""


def _why_not() -> str:
    if _choice == "reference":
        return "GRADCENTRAL_KERNELS=reference"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install gradcentral[triton]"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # of another make, under another name
        version = ""
    if version and tuple(map(int, version.split(".")[:2])) < _OLDEST:
        return f"Triton {version} is too old: {'.'.join(map(str, _OLDEST))} or a newer one (torch 2.8) is needed"
    if torch.version.hip is not None:
        return "torch is built for ROCm, where these kernels were never run"
    if _interpret and not interpreted:
        return "TRITON_INTERPRET is set, which only GRADCENTRAL_KERNELS=triton makes use of"
    return ""


unavailable = _why_not()
"""Why no tensor can be served, whatever its device; empty where some can."""


def missing() -> str:
    """Why the kernels can't be used on this machine; empty where they can. Asks for its devices."""
    if unavailable or interpreted or torch.cuda.is_available():
        return unavailable
    return "no CUDA device"


def serves(tensor: Tensor) -> bool:
    """Whether tensors of this device are for these kernels."""
    return not unavailable and (tensor.device.type == "cpu" if interpreted else tensor.is_cuda)


def loop_of(tensor: Tensor, vectors: WeightVectors | None) -> Loop | None:
    """The loop over a tensor that the kernels can serve, or None: a plain dense tensor of a type they know.

    Without vectors every element is one of its own.
    """
    if not is_plain(tensor) or tensor.dtype not in DTYPES or not serves(tensor):
        return None
    return loop_over(vectors, tensor.shape, tensor.stride())


def alike(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether a gradient or state tensor lies in memory as its parameter does; its type may be another one."""
    return lies_as(parameter, tensor) and tensor.dtype in DTYPES


def is_state(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether a state tensor lies in memory as its parameter does, in f32 or bf16: in f16 small squares are 0."""
    return alike(parameter, tensor) and tensor.dtype != torch.float16


def is_number(tensor: object, device: torch.device) -> bool:
    """Whether this is one f32 on the device, as torch's fused optimizers keep their step counters."""
    return type(tensor) is Tensor and tensor.numel() == 1 and tensor.device == device and tensor.dtype == torch.float32


def __getattr__(name: str) -> Any:
    if name in ("CenteringPlan", "StepPlan"):
        from gradcentral.kernels.triton import plans

        return getattr(plans, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
