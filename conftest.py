"""Exclude the Triton kernels, whose modules import triton, from collection where triton is not installed."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["src/gradcentral/kernels/triton/*"]
