"""Kernels that center or update many tensors in one call; torch's reference path processes all other tensors.

C kernels (`native`) process CPU tensors, Triton kernels (`triton`) CUDA tensors. The environment variable
``GRADCENTRAL_KERNELS=reference`` turns both off; ``native`` or ``triton`` raises an error at import if those kernels
cannot be used. With ``triton`` and ``TRITON_INTERPRET=1``, Triton's interpreter processes CPU tensors, for tests
without a GPU.
"""

from __future__ import annotations

from gradcentral.kernels.centering import Centering, Means
from gradcentral.kernels.planner import kernels_for, unavailable_reasons

__all__ = ["Centering", "Means", "kernels_for", "unavailable_reasons"]
