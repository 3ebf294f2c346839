"""Ctrl-C while the command line imports torch, which takes seconds: one line instead of a traceback.

The package imports this module before torch. It changes nothing in other programs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

__all__ = ["end"]


def _is_command() -> bool:
    """Return whether this process was started as ``gradcentral`` or ``python -m gradcentral``."""
    given, program = sys.orig_argv, [*getattr(sys, "argv", []), ""][0]
    if program == "-m":  # the package is being imported in order to run its __main__
        return "-m" in given[:-1] and given[given.index("-m") + 1] in ("gradcentral", "gradcentral.__main__")
    # Worker processes inherit sys.argv, but not sys.orig_argv.
    return Path(program).stem == "gradcentral" and program in given


def _exit(number: int, frame: object) -> None:
    os.write(2, b"gradcentral: interrupted\n")
    os._exit(128 + number)


def end() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, after everything is imported."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _exit)
