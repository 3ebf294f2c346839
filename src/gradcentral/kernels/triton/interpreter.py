"""Whether Triton's interpreter is in use. A module of its own, so that nothing else is imported to find out."""

from __future__ import annotations

import os

__all__ = ["INTERPRETED"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton, which reads the same variable when it is imported, runs every kernel on the CPU in Python."""
