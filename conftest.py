"""Exclude modules from collection that need what may be missing: the adapters, the Triton kernels, and tasks with data.

The tests of each adapter, in tests/integrations, run its examples.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["src/gradcentral/integrations/*", "src/gradcentral/experiment/tasks/*"]
if not importlib.util.find_spec("triton"):
    collect_ignore_glob.append("src/gradcentral/kernels/triton/*")
