"""Build the model named on the command line of ``gradcentral layout``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
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
    """
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
    from gradcentral.experiment.loading import load_task
    from gradcentral.experiment.task import Task

    task = load_task(path)
    if not isinstance(task, Task):
        raise ModelError(f"{path}: its task is a function without a model to build; name the model, as in {_EXAMPLE}")
    return task.model


def _named_model(target: str) -> Callable[[], Any]:
    module_name, _, expression = target.partition(":")
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
        found = eval(code, {name: getattr(module, name) for name in code.co_names if hasattr(module, name)})
        if isinstance(found, nn.Module) or not callable(found):
            return found
        config = getattr(found, "config_class", None)
        return found() if config is None else found(config())

    return make
