"""Load a task in any of its forms, and pack it for worker processes."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.data import end_workers
from gradcentral.experiment.determinism import digest, seed_everything
from gradcentral.experiment.errors import TaskError, line_of, one_line
from gradcentral.experiment.task import CustomTask, Task, name_of
from gradcentral.experiment.tasks import MODULES
from gradcentral.extras import optional

__all__ = ["BUILT_IN", "AnyTask", "LoadedTask", "PackedTask", "find_task", "load_task", "unpack"]

AnyTask = Task | CustomTask

BUILT_IN = {name: Path(__file__).resolve().with_name("tasks") / f"{module}.py" for name, module in MODULES.items()}


class PackedTask(NamedTuple):
    """A task packed for a worker: its file and source, or, without a file, its pickle or the path of the pickle."""

    file: Path | None
    content: bytes | Path
    folder: Path | None = None
    """The working directory in which the file was run; the file may change it."""
    name: str = ""
    """The name of a built-in task, whose file may define several."""


@dataclass(frozen=True)
class LoadedTask:
    """A task, the Python file that defines it, and the file's content, which workers run even if the file changes."""

    task: AnyTask
    file: Path | None = None
    source: bytes = b""
    folder: Path | None = None
    name: str = ""

    def pack(self, folder: Path | None) -> PackedTask:
        """Pack the task for `unpack`; a task from memory is pickled into ``folder``, if workers share one."""
        if self.file is not None:
            return PackedTask(self.file, self.source, self.folder, self.name)
        if isinstance(self.task, Task):
            for data in (self.task.train, self.task.test):
                end_workers(data)  # which cannot be pickled
        try:
            content: bytes = optional("cloudpickle").dumps(self.task)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise TaskError(
                f"task {self.task.name!r} cannot be sent to worker processes ({one_line(error)}): "
                "put it in a file and pass its path, or use jobs=1"
            ) from error
        if folder is None:
            return PackedTask(None, content)
        path = folder / "task.pickle"
        path.write_bytes(content)
        return PackedTask(None, path)


@functools.cache
def unpack(packed: PackedTask) -> LoadedTask:
    """Restore a packed task, once per process."""
    file, content, working, name = packed
    if isinstance(content, Path):
        content = content.read_bytes()
    if working is not None and working != Path.cwd():
        with suppress(OSError):  # another machine may not have the folder
            os.chdir(working)
    return LoadedTask(pickle.loads(content)) if file is None else _run_file(file, content, name)


def load_task(source: AnyTask | Callable[..., Any] | str | Path) -> AnyTask:
    """Load a task.

    Args:
        source: the name of a built-in task, the path of a Python file that defines ``task``, a bare ``run(seed, arm)``
            function, or a task, which is returned unchanged. A file is run with the seed 0, so that the data it draws
            are the same each time.

    Raises:
        TaskError: the task or file does not exist, or the file cannot be run; the message names the line.

    Examples:
        >>> load_task("digits").name
        'digits'
    """
    return find_task(source).task


def find_task(source: AnyTask | Callable[..., Any] | str | Path) -> LoadedTask:
    """Load a task together with its file; see `load_task`."""
    if isinstance(source, (Task, CustomTask)):
        return LoadedTask(source)
    if callable(source):
        return LoadedTask(CustomTask(name=name_of(source).strip("<>"), run=source))
    if not isinstance(source, (str, Path)):
        raise TaskError(f"task: give a Task, the path of a Python file or one of {', '.join(BUILT_IN)}, not {source!r}")
    path = (BUILT_IN.get(str(source)) or Path(source).expanduser()).resolve()
    if path.suffix != ".py" and not path.exists():
        raise TaskError(f"unknown task {str(source)!r}; choose from {', '.join(BUILT_IN)}, or give a Python file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TaskError(f"{path}: the file does not exist") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from error
    return _run_file(path, content, str(source) if str(source) in BUILT_IN else "")


def _run_file(path: Path, content: bytes, name: str = "") -> LoadedTask:
    # As with `python my_task.py`, the file may import modules from its own folder, now or later.
    if not name and str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = types.ModuleType(f"gradcentral_task_{digest(str(path))}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module up here
    folder, arguments = Path.cwd(), sys.argv
    sys.argv = [str(path)]  # the arguments of this program are not those of the file
    try:
        with preserve_state():
            seed_everything(0)  # data that the file draws without a seed are the same in every process
            exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise TaskError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise TaskError(
            f"{line_of(error, path)}: the file ends the program ({one_line(error)}); "
            'put what a task does not need below if __name__ == "__main__":'
        ) from error
    except Exception as error:
        if name:  # of a built-in task, data are missing, or a library
            raise
        raise TaskError(f"{line_of(error, path)}: {one_line(error)}") from error
    finally:
        sys.argv = arguments
    task = module.tasks[name] if name and hasattr(module, "tasks") else getattr(module, "task", None)
    if task is None:
        raise TaskError(f"{path}: does not define `task`; end it with task = Task(...)")
    if callable(task) and not isinstance(task, type):
        task = CustomTask(name=path.stem, run=task)
    if not isinstance(task, (Task, CustomTask)):
        raise TaskError(f"{path}: `task` is of type {type(task).__name__}; make it a gradcentral.experiment.Task")
    return LoadedTask(task, path, content, folder, name)
