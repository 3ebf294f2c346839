"""Exclude modules from collection that import libraries which may be missing: the adapters and the Triton kernels.

The tests of each adapter, in tests/integrations, run its examples.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["src/gradcentral/integrations/*"]
if not importlib.util.find_spec("triton"):
    collect_ignore_glob.append("src/gradcentral/kernels/triton/*")
