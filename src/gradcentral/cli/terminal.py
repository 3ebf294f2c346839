"""What a command does with its surroundings: encodings of the terminal, signals, and errors as one line."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["encode_everything", "exit_after", "exit_after_interrupt", "exit_with", "signals_caught"]

# The signs that commands print, for encodings that lack them; others are printed as "?".
_ASCII = str.maketrans(
    {"±": "+-", "–": "-", "−": "-", "×": "x", "÷": "/", "·": "*", "‖": "||", "Φ": "Phi", "ᵀ": "^T", "⁰": "_0"}
    | {"²": "^2", "√": "sqrt ", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "…": "...", "∂": "d", "λ": "lambda"}
)
_ERRORS = "gradcentral.ascii"
_STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EINVAL)

_received = signal.SIGINT


def encode_everything() -> None:
    """Let stdout and stderr print every character, whatever their encoding; a closed stream prints nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end].translate(_ASCII)
    return signs.encode("ascii", errors="replace").decode("ascii"), error.end


@contextmanager
def signals_caught() -> Iterator[None]:
    """Treat the signals that end a process as Ctrl-C, so that worker processes and temporary files are removed."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # A signal that the parent process ignores, as with nohup, stays ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    global _received
    _received = signal.Signals(number)
    raise KeyboardInterrupt


def exit_after_interrupt(more: str = "") -> NoReturn:
    """Exit after Ctrl-C or another signal, with the status that a shell expects."""
    exit_with(("interrupted" if _received == signal.SIGINT else f"ended by {_received.name}") + more, 128 + _received)


def exit_with(message: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    with suppress(OSError, ValueError):  # stderr may be closed, or the terminal gone
        print(f"gradcentral: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def exit_after(error: OSError) -> NoReturn:
    """Exit because something cannot be written; silently if a reader of stdout such as ``head`` has ended."""
    if error.filename is not None or error.errno not in _STREAM_ERRORS:
        place = "" if error.filename is None else f"{error.filename}: "
        exit_with(f"{place}{error.strerror or error}")
    with suppress(OSError):  # otherwise Python writes the rest again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        sys.exit(1)
    exit_with(f"the output cannot be written ({error.strerror})")
