"""Libraries that come as extras: imported when they are needed, and asked for in one line where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MissingExtraError", "optional"]


class MissingExtraError(ImportError):
    """Something needs a library that is not installed; the message says how to get it."""


def optional(module: str, extra: str = "experiments") -> ModuleType:
    """Import a module of an extra.

    Raises:
        MissingExtraError: it is not installed.

    Examples:
        >>> optional("no_such_library")
        Traceback (most recent call last):
        gradcentral.extras.MissingExtraError: this needs no_such_library: pip install 'gradcentral[experiments]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingExtraError(f"this needs {missing}: pip install 'gradcentral[{extra}]'") from error
