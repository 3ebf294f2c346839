"""Exclusive use of a destination by one `Monitor`, so that the records of two trainings are not mixed."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Hashable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claim"]


class Claim:
    """The right to write to a destination under a name, until `release` or until the claim is garbage.

    Monitors of one process may share a destination under different names. A path is also locked against other
    processes, by the operating system, so that the lock ends with the process, however it ends. (Windows and some
    network file systems have no such locks; the path is then claimed in this process only.)

    Args:
        destination: a path that exists, or any object.
        name: name of the monitor.
        where: the destination in error messages.

    Raises:
        ValueError: another monitor has claimed the destination under this name, or another process has locked the path.
    """

    def __init__(self, destination: Path | object, name: str | None, where: object) -> None:
        key = _key(destination)
        if key in _used and name in _used[key].names:
            gc.collect()  # a monitor that is part of a reference cycle, such as that of a scheduler, may be garbage
        found = _used.get(key)
        if found is not None and name in found.names:
            raise ValueError(
                f"to: {where} already receives the records of another Monitor; give each Monitor its own name=, give "
                "another destination, or call remove() on the other Monitor first"
            )
        try:
            self._use: _Use | None = found or _Use(destination)
        except BlockingIOError as error:
            raise ValueError(
                f"to: {where} receives the records of a Monitor in another process; give another path, or, with "
                "several ranks, pass to= in one of them only"
            ) from error
        _used[key] = self._use
        self._use.names[name] = self

    def release(self) -> None:
        """Give the destination up. Calling this twice is harmless."""
        if self._use is not None:
            for name in [name for name, claim in self._use.names.items() if claim is self]:
                del self._use.names[name]
        self._use = None


class _Use:
    """A destination in use: it is kept alive by its claims, and a path stays locked as long."""

    def __init__(self, destination: object) -> None:
        self.names: weakref.WeakValueDictionary[str | None, Claim] = weakref.WeakValueDictionary()
        self.destination = destination  # keeps the object alive, so that its id stays unique
        if isinstance(destination, Path) and fcntl is not None:
            descriptor = os.open(destination, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise
            except OSError:  # no locks on this file system
                pass
            weakref.finalize(self, _unlock, descriptor, os.getpid())


_used: weakref.WeakValueDictionary[Hashable, _Use] = weakref.WeakValueDictionary()


def _key(destination: object) -> Hashable:
    if isinstance(destination, Path):
        status = destination.stat()  # equal for all names of a file, such as links
        return status.st_dev, status.st_ino
    try:
        hash(destination)
    except TypeError:
        return id(destination)
    return destination  # each access to a bound method creates another object, but they are equal


def _unlock(descriptor: int, process: int) -> None:
    if os.getpid() == process:  # forked processes, such as those of a DataLoader, inherit the lock
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
