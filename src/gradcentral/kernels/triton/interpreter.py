"""Detect Triton's interpreter, in a module of its own, so that the check imports nothing else."""

from __future__ import annotations

import os

__all__ = ["INTERPRETED"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton, which reads the same variable when it is imported, runs every kernel on the CPU in Python."""
