"""Kernels in Triton for CUDA devices: one launch for all parameters of a step.

Same interface as the native kernels. Triton is imported when the first plan is made. With ``TRITON_INTERPRET=1`` and
``GRADCENTRAL_KERNELS=triton`` in the environment, Triton's interpreter serves CPU tensors instead: slow, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradcentral.kernels.triton.support import (
    INTERPRETED,
    DeviceCoefficients,
    accepts_counter,
    accepts_gradient,
    accepts_state,
    loop_of,
    serves,
    serves_cpu,
    unavailable_reason,
)

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


def __getattr__(name: str) -> Any:
    if name in ("CenteringPlan", "StepPlan"):
        from gradcentral.kernels.triton import plans

        return getattr(plans, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
