"""Worker processes that end with the process that started them, even if that one was killed."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

__all__ = ["end_with_parent"]

_INTERVAL = 0.5  # seconds
_folders: set[Path] = set()


def end_with_parent(parent: int, folder: Path) -> None:
    """Watch the parent process from a thread of this process; when it has ended, remove the folder and exit.

    A parent that is terminated or killed cannot end its workers, which would otherwise finish their runs. Linux can
    send a signal instead (PR_SET_PDEATHSIG), but already when the thread that started a worker ends.
    """
    is_watched = bool(_folders)
    _folders.add(folder)
    if not is_watched:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    if sys.platform == "win32":
        import ctypes

        kernel = ctypes.windll.kernel32
        if process := kernel.OpenProcess(0x00100000, False, parent):  # SYNCHRONIZE
            kernel.WaitForSingleObject(process, 0xFFFFFFFF)  # INFINITE
    else:
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
