"""The line of the user's code that a warning names."""

from __future__ import annotations

import sys

__all__ = ["level_of_caller"]

# torch.optim wraps each step; torch.compile wraps functions that it must not trace.
_BETWEEN = ("gradcentral.", "torch.optim.", "torch.utils._contextlib.", "torch._compile.", "torch._dynamo.")


def level_of_caller() -> int:
    """Return the ``stacklevel`` at which a warning of the calling function names the line that called gradcentral."""
    level, frame = 1, sys._getframe(1)
    while f"{frame.f_globals.get('__name__', '')}.".startswith(_BETWEEN) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level
