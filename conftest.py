"""Which files pytest leaves out: the kernels in Triton can't be imported, not even for their examples, without it."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["src/gradcentral/kernels/triton/*"]
