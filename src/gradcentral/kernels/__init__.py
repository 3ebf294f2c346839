"""Kernels that center, and step, many tensors in one call; torch's reference path serves whatever they do not.

CPU tensors are served by C kernels (`native`), CUDA tensors by Triton kernels (`triton`). The environment variable
``GRADCENTRAL_KERNELS=reference`` turns both off; ``native`` or ``triton`` makes their absence an error at import. With
``triton`` and ``TRITON_INTERPRET=1``, Triton's interpreter serves CPU tensors, for tests without a GPU.
"""

from __future__ import annotations

from gradcentral.kernels.centering import Centering, Means
from gradcentral.kernels.planner import kernels_for, unavailable_reasons

__all__ = ["Centering", "Means", "kernels_for", "unavailable_reasons"]
