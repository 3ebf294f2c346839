"""A task from a file of the user's, from the built-in ones, or from memory; and how to hand it to a worker process."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gradcentral.experiment.errors import ExperimentError, TaskError
from gradcentral.experiment.task import CustomTask, Task, name_of
from gradcentral.extras import optional

__all__ = [
    "BUILT_IN",
    "Address",
    "Parcel",
    "TaskReference",
    "describe",
    "follow_address",
    "load_task",
    "open_parcel",
    "refer_to",
    "where",
]

AnyTask = Task | CustomTask

BUILT_IN = {
    "digits": "gradcentral.experiment.tasks.digits",
    "digits-batchnorm": "gradcentral.experiment.tasks.digits_batchnorm",
    "digits-vit": "gradcentral.experiment.tasks.digits_vit",
}


class Address(NamedTuple):
    """Where a worker process finds a task, and a hash of what it must find there."""

    kind: Literal["built-in", "file", "value"]
    location: str
    version: str


class Parcel(NamedTuple):
    """A task by content: the source of its file, or its pickle; nothing for a built-in one."""

    address: Address
    content: bytes


@dataclass(frozen=True)
class TaskReference:
    """A task with the place it came from, so that workers load it once instead of receiving its data every run."""

    task: AnyTask
    address: Address

    @property
    def source(self) -> Path | None:
        """The task's own source file, where there is one."""
        if self.address.kind == "built-in":
            return Path(str(importlib.import_module(self.address.location).__file__))
        return Path(self.address.location) if self.address.kind == "file" else None

    def portable(self, folder: Path) -> Address:
        """An address that other processes of this machine can follow: a value is written to a file in ``folder``."""
        if self.address.kind != "value":
            return self.address
        content = self._pickled()
        path = folder / "task.pickle"
        path.write_bytes(content)
        return Address("value", str(path), hashlib.sha256(content).hexdigest())

    def parcel(self) -> Parcel:
        """The task itself, for processes of other machines."""
        kind, location, _ = self.address
        if kind == "value":
            content = self._pickled()
            return Parcel(Address(kind, "", hashlib.sha256(content).hexdigest()), content)
        return Parcel(self.address, Path(location).read_bytes() if kind == "file" else b"")

    def _pickled(self) -> bytes:
        try:
            content: bytes = optional("cloudpickle").dumps(self.task)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise TaskError(
                f"task {self.task.name!r} can't be sent to worker processes ({describe(error)}): "
                "put it in a file and pass its path, or use jobs=1"
            ) from error
        return content


def load_task(source: str | Path) -> AnyTask:
    """The task of a built-in name or of a Python file that defines ``task``.

    Raises:
        TaskError: there is no such task or file, or the file can't be run; the message names the line.

    Examples:
        >>> load_task("digits").name
        'digits'
    """
    return refer_to(source).task


def refer_to(source: AnyTask | Callable[..., Any] | str | Path) -> TaskReference:
    """A reference to any of the forms in which a task can be given."""
    if isinstance(source, (Task, CustomTask)):
        return TaskReference(source, Address("value", "", ""))
    if isinstance(source, (str, Path)):
        return _refer_by_name(source)
    if callable(source):
        return TaskReference(CustomTask(name=name_of(source).strip("<>"), run=source), Address("value", "", ""))
    raise TaskError(f"task: give a Task, a file's path or one of {', '.join(BUILT_IN)}, not {source!r}")


def _refer_by_name(source: str | Path) -> TaskReference:
    if str(source) in BUILT_IN:
        module = BUILT_IN[str(source)]
        return TaskReference(_load_built_in(module), Address("built-in", module, ""))
    path = Path(source).expanduser()
    if path.suffix != ".py" and not path.exists():
        raise TaskError(f"there is no task {str(source)!r}: give a Python file, or one of {', '.join(BUILT_IN)}")
    path = path.resolve()
    address = Address("file", str(path), _version(path))
    return TaskReference(_load_file(path), address)


@functools.cache
def follow_address(address: Address) -> TaskReference:
    """In a worker: the task at an address, loaded once a process."""
    kind, location, version = address
    if kind == "built-in":
        return TaskReference(_load_built_in(location), address)
    if kind == "file":
        if _version(Path(location)) != version:
            raise TaskError(f"{location}: the file changed while its runs were going on; start again")
        return TaskReference(_load_file(Path(location)), address)
    return TaskReference(pickle.loads(Path(location).read_bytes()), address)


_opened: dict[Address, TaskReference] = {}


def open_parcel(parcel: Parcel) -> TaskReference:
    """In a worker anywhere: the task of a parcel, loaded once a process.

    A file that is there under its own path, as on this machine or a shared disk, is taken from there, so that modules
    beside it can be imported.
    """
    address, content = parcel
    if address not in _opened:
        _opened[address] = _unpacked(address, content)
    return _opened[address]


def _unpacked(address: Address, content: bytes) -> TaskReference:
    kind, location, version = address
    if kind == "built-in":
        return follow_address(address)
    if kind == "value":
        return TaskReference(pickle.loads(content), address)
    path = Path(location)
    if not (path.is_file() and _version(path) == version):
        if hashlib.sha256(content).hexdigest() != version:
            raise TaskError(f"{location}: the file changed while its runs were going on; start again")
        path = Path(tempfile.mkdtemp(prefix="gradcentral-")) / path.name
        path.write_bytes(content)
    return TaskReference(_load_file(path), Address("file", str(path), version))


def _load_built_in(module: str) -> AnyTask:
    try:
        task = importlib.import_module(module).task
    except ModuleNotFoundError as error:
        raise TaskError(f"the built-in tasks need {error.name}: pip install 'gradcentral[experiments]'") from error
    assert isinstance(task, (Task, CustomTask))
    return task


def _version(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise TaskError(f"{path}: there is no such file") from None
    except OSError as error:
        raise TaskError(f"{path}: can't be read ({error.strerror})") from error


def _load_file(path: Path) -> AnyTask:
    # As for `python my_task.py`: modules beside the file can be imported, now and later.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"gradcentral_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise TaskError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: is no Python source ({error.reason})") from error
    except Exception as error:
        raise TaskError(f"{where(error, path)}: {describe(error)}") from error
    task = getattr(module, "task", None)
    if task is None:
        raise TaskError(f"{path}: defines no `task`; end it with task = Task(...)")
    if callable(task) and not isinstance(task, type):
        return CustomTask(name=path.stem, run=task)
    if not isinstance(task, (Task, CustomTask)):
        raise TaskError(f"{path}: `task` is a {type(task).__name__}; it must be a gradcentral.experiment.Task")
    return task


def describe(error: BaseException) -> str:
    """An exception on one line; our own errors speak for themselves."""
    message = " ".join(str(error).split())
    if isinstance(error, ExperimentError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def where(error: BaseException, path: Path | None = None) -> str:
    """The line that failed: the last one in the user's own file, else the last one outside torch and here."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return str(path)
    own = [frame for frame in frames if path is not None and Path(frame.filename) == path]
    foreign = [frame for frame in frames if not {"torch", "gradcentral"} & set(Path(frame.filename).parts)]
    frame = (own or foreign or list(frames))[-1]
    return f"{frame.filename}, line {frame.lineno}"
