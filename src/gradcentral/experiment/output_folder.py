"""A folder that commands write into, with a list of the files that they wrote, so that no other file is replaced."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gradcentral.experiment.errors import ResultsError

__all__ = ["OutputFolder"]

LIST = "gradcentral.json"
_PURPOSE = "The files of this folder that gradcentral wrote, and may replace. It changes no other file."
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class OutputFolder:
    """A folder for output.

    A file belongs to gradcentral only if ``gradcentral.json`` in the folder lists it. `claim` the names of all files
    before writing the first. A `ResultsError` is raised for files that belong to somebody else, and for a folder that
    cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def check(self, names: Sequence[str]) -> None:
        """Raise a `ResultsError` if a file of one of these names exists and belongs to somebody else; write nothing."""
        own = self._listed()
        foreign = [name for name in names if name not in own and os.path.lexists(self.path / name)]
        if foreign:
            raise ResultsError(
                f"{self.path}: already holds {', '.join(foreign)}, not written by gradcentral; give another --out"
            )

    def claim(self, names: Sequence[str]) -> None:
        """Create the folder, and list files that will be written."""
        self.check(names)
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
        self._list({*self._listed(), *names}, self.path)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a claimed file whole: if the disk is full, the previous content remains."""
        if isinstance(content, str):
            # Names of files may hold surrogates, which UTF-8 cannot represent.
            content = content.encode("utf-8", errors="backslashreplace")
        path = self.path / name
        new = path.with_name(f".{name}.{os.getpid()}.new")
        with self.writing():
            try:
                with new.open("xb") as file:  # "x": never truncate an existing file
                    file.write(content)
                new.replace(path)
            except BaseException:
                with suppress(OSError):
                    new.unlink()
                raise
        return path

    def move_aside(self, names: Sequence[str]) -> None:
        """Move the listed files of these names into a new folder ``previous-N``, with a list of their own."""
        listed = self._listed()
        own = [name for name in names if name in listed and os.path.lexists(self.path / name)]
        if not own:
            return
        with self.writing():
            candidates = (self.path / f"previous-{number}" for number in itertools.count(1))
            aside = next(path for path in candidates if not os.path.lexists(path))
            aside.mkdir()
            self._list(set(own), aside)
            for name in own:
                (self.path / name).replace(aside / name)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Convert an `OSError` inside the block to a `ResultsError`."""
        try:
            yield
        except OSError as error:
            path = self.path if error.filename is None else error.filename
            remedy = "free space, or give another --out" if error.errno in _FULL else "give another --out"
            raise ResultsError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error

    def _listed(self) -> set[str]:
        path = self.path / LIST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: cannot be read ({error}); give another --out") from error
        try:
            files = json.loads(text)["files"]
        except (ValueError, TypeError, KeyError, RecursionError):
            files = None
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            raise ResultsError(f"{path}: is not a list of files written by gradcentral; give another --out")
        return set(files)

    def _list(self, names: set[str], folder: Path) -> None:
        text = json.dumps({"purpose": _PURPOSE, "files": sorted(names)}, indent=2) + "\n"
        OutputFolder(folder).write(LIST, text)
