"""Optional libraries, imported when they are needed; the error for a missing one gives the command to install it."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

__all__ = ["MissingExtraError", "optional", "own_version"]


class MissingExtraError(ImportError):
    """A required library is not installed; the message gives the command that installs it."""


def optional(module: str, extra: str = "experiments") -> ModuleType:
    """Import a module that one of gradcentral's extras installs.

    Raises:
        MissingExtraError: it is not installed.

    Examples:
        >>> optional("no_such_library")
        Traceback (most recent call last):
        gradcentral.extras.MissingExtraError: no_such_library is not installed: pip install 'gradcentral[experiments]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingExtraError(f"{missing} is not installed: pip install 'gradcentral[{extra}]'") from error


def own_version() -> str:
    """Return gradcentral's version, or "not installed" if it runs from its source tree."""
    try:
        return metadata.version("gradcentral")
    except metadata.PackageNotFoundError:
        return "not installed"
