"""Build the model named on the command line of ``gradcentral layout``."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from gradcentral.experiment.errors import one_line

__all__ = ["ModelError", "build_model"]

_EXAMPLE = '"torch.nn:Linear(3, 2)"'


class ModelError(ValueError):
    """The model cannot be built; the message gives a target that works."""


def build_model(target: str) -> nn.Module:
    """Build the named model, on the meta device if possible, so that its weights take no memory.

    A class of transformers is given its default configuration. The forms of a target are in the help of the command.
    What the user's code prints goes to stderr, so that stdout contains the layout alone.
    """
    with redirect_stdout(sys.stderr):
        try:
            return _build(target, _task_model(target) if target.endswith(".py") else _named_model(target))
        except SystemExit as error:
            raise ModelError(f"{target}: its code ends the program (SystemExit: {error}); remove the exit") from error


def _build(target: str, make: Callable[[], Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            model = make()
    except Exception:  # building may need values, which tensors on the meta device do not have
        try:
            model = make()
        except Exception as error:
            hint = f"; if it needs arguments, write them, as in {_EXAMPLE}" if isinstance(error, TypeError) else ""
            raise ModelError(f"{target}: {one_line(error)}{hint}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{target} is a {type(model).__name__}, not a torch.nn.Module or a function that returns one")
    return model


def _task_model(path: str) -> Callable[[], Any]:
    from gradcentral.experiment.errors import TaskError
    from gradcentral.experiment.loading import load_task
    from gradcentral.experiment.task import Task

    try:
        task = load_task(path)
    except TaskError as error:
        if error.__cause__ is not None or not Path(path).is_file():  # the file cannot be run or read
            raise
        raise ModelError(f"{error}; to show a model of this file: {_target_in(path, 'NAME')}") from error
    if not isinstance(task, Task):
        raise ModelError(f"{path}: its task is a function without a model to build; name the model, as in {_EXAMPLE}")
    return task.model


def _named_model(target: str) -> Callable[[], Any]:
    module_name, _, expression = target.partition(":")
    file = module_name if module_name.endswith(".py") else f"{module_name}.py"
    if expression and (file == module_name or os.sep in module_name) and Path(file).is_file():
        raise ModelError(f"{target}: {module_name} is a path; name the module: {_target_in(file, expression)}")
    if not (module_name and expression):
        raise ModelError(f"{target}: write MODULE:NAME, as in {_EXAMPLE}, or a task file")
    if os.getcwd() not in sys.path:  # as in python -m: modules in the working directory can be named
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"{target}: cannot import {module_name} ({error})") from error

    def make() -> Any:
        code = compile(expression, target, "eval")
        # vars(module) is not enough: transformers creates its names on access.
        found = eval(code, {name: getattr(module, name) for name in _names(code) if hasattr(module, name)})
        if isinstance(found, nn.Module) or not callable(found):
            return found
        config = getattr(found, "config_class", None)
        return found() if config is None else found(config())

    return make


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names in an expression, including those in its comprehensions and lambdas."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _target_in(path: str, expression: str) -> str:
    """Return the command that shows a model defined in a file, as a module of the working directory if possible."""
    file, here = Path(path).resolve(), Path.cwd()
    pieces = file.relative_to(here).with_suffix("").parts if file.is_relative_to(here) else ()
    if not pieces or not all(map(str.isidentifier, pieces)):
        pieces = (file.stem,)
    folder = file.parents[len(pieces) - 1]
    command = f"gradcentral layout {shlex.quote('.'.join(pieces) + ':' + expression)}"
    return command if folder == here else f"cd {shlex.quote(str(folder))} && {command}"
