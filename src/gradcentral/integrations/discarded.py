"""A warning for a call whose result is discarded, for functions that users may expect to change their argument."""

from __future__ import annotations

import dis
import sys
import warnings
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

__all__ = ["warn_if_discarded"]


def warn_if_discarded(result: Any, used: Sequence[object], message: str) -> None:
    """Warn if the line that calls the caller of this function also deletes the caller's result.

    Python deletes at once what is not assigned, unless it is part of a reference cycle; then there is no warning.

    Args:
        result: what the caller is going to return.
        used: no warning if it has become non-empty, because something was read from the result.
        message: the warning.
    """
    finalizer = weakref.finalize(result, _warn, _line(sys._getframe(2)), used, message)
    finalizer.atexit = False


def _warn(line_of_call: tuple[object, ...], used: Sequence[object], message: str) -> None:
    frame = sys._getframe(2)  # frame 1 is that of weakref.finalize
    # In a loop, the line of the call may also delete what it has assigned before; that is another instruction.
    is_discarded = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "POP_TOP"
    if not used and is_discarded and _line(frame) == line_of_call:
        warnings.warn(message, stacklevel=3)


def _line(frame: FrameType) -> tuple[object, ...]:
    return frame.f_code, frame.f_lineno
