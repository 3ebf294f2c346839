"""The layout of a model named on the command line: build it without memory, and say what deserves a look."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from gradcentral.layout import WeightLayout, table
from gradcentral.layout.entry import Entry

__all__ = ["ModelError", "as_json", "as_text", "build_model", "points_to_look_at"]

_FEW = 4
"""At this fan-in and below, centering takes a quarter or more of a unit's freedom."""


class ModelError(ValueError):
    """The model can't be built; the message says what to write instead."""


def build_model(target: str) -> nn.Module:
    """The model that a text names, on the meta device where it allows that, so that no memory is spent.

    Args:
        target: ``MODULE:NAME``, where NAME is a model, a class or function that makes one without arguments, or a
            class of transformers, which gets its default configuration; or ``MODULE:EXPRESSION``, in which the
            module's names can be used, as in ``"timm:create_model('resnet18')"``; or a task file (``my_task.py``).

    Raises:
        ModelError: there is no such module or name, or it makes no `torch.nn.Module`.

    Examples:
        >>> build_model("torch.nn:Linear(3, 2)")
        Linear(in_features=3, out_features=2, bias=True)
    """
    make = _task_model(target) if target.endswith(".py") else _named_model(target)
    try:
        with torch.device("meta"):
            model = make()
    except Exception:  # what needs values while it is built does without the meta device
        try:
            model = make()
        except Exception as error:
            hint = "; if it needs arguments, write them: MODULE:NAME(...)" if isinstance(error, TypeError) else ""
            raise ModelError(f"{target}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{target} is a {type(model).__name__}; it must be or make a torch.nn.Module")
    return model


def as_text(model: nn.Module, layout: WeightLayout, *, every: bool = False) -> str:
    """The table, the totals, and the points to look at."""
    parts = [table.render(layout.entries, every=every), layout.summary()]
    if points := points_to_look_at(model, layout):
        parts.append("\n".join(["Have a look:", *(f"- {point}" for point in points)]))
    return "\n\n".join(parts)


def as_json(model: nn.Module, layout: WeightLayout) -> dict[str, Any]:
    """The same for programs: ``parameters``, ``totals`` and ``look_at``."""
    shaped = [entry for entry in layout.entries if not is_lazy(entry.parameter)]
    return {
        "parameters": [_as_dict(entry) for entry in layout.entries],
        "totals": {
            "parameters": len(layout.entries),
            "centered": len(layout),
            "elements": sum(entry.parameter.numel() for entry in shaped),
            "centered_elements": sum(parameter.numel() for parameter in layout),
            "unknown": len(layout.unknown),
        },
        "look_at": points_to_look_at(model, layout),
    }


def points_to_look_at(model: nn.Module, layout: WeightLayout) -> list[str]:
    """What may not be as the user expects, one line each."""
    return [
        *_lines(layout.unknown, "left alone as unknown", lambda entry: entry.reason),
        *(f"to decide, paste and edit: {line}" for line in layout.suggestions),
        *_lines(_alone(layout, "tied:"), "left alone, overrides={name: WeightVectors(...)} centers it", _reason),
        *_lines(_alone(layout, "fan-in 1"), "left alone", _reason),
        *_lines(_alone(layout, "pruned"), "left alone", _reason),
        *_lines(_alone(layout, "lazy"), "not decided yet", _reason),
        *_lines(
            [entry for entry in layout.entries if entry.vectors is not None and entry.vectors.fan_in <= _FEW],
            "centered, exclude=[...] leaves it alone",
            lambda entry: f"fan-in {entry.vectors.fan_in}: few directions are left" if entry.vectors else "",
        ),
        *_lines(
            [entry for entry in layout.entries if entry.vectors is not None and entry.name in _strided(model)],
            "centered as whole filters",
            lambda entry: "transposed convolution with a stride: an output sees only some taps of its filter",
        ),
    ]


def _lines(entries: Sequence[Entry], verdict: str, why: Callable[[Entry], str]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        by_reason.setdefault(why(entry), []).append(entry.name)
    for reason, names in by_reason.items():
        yield f"{', '.join(table.compact_names(names))}: {verdict} ({reason})"


def _alone(layout: WeightLayout, reason: str) -> list[Entry]:
    return [entry for entry in layout.entries if entry.reason.startswith(reason)]


def _reason(entry: Entry) -> str:
    return entry.reason


def _strided(model: nn.Module) -> set[str]:
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, _ConvTransposeNd) and max(module.stride) > 1 and max(module.kernel_size) > 1
    }


def _as_dict(entry: Entry) -> dict[str, Any]:
    vectors = entry.vectors
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "shape": None if is_lazy(entry.parameter) else list(entry.parameter.shape),
        "trains": entry.parameter.requires_grad,
        "weight_vectors": vectors
        and {
            "count": vectors.count,
            "fan_in": vectors.fan_in,
            "span": list(vectors.span),
            "view": vectors.view and list(vectors.view),
        },
        "rule": entry.origin or None,
        "reason": entry.reason or None,
        "unknown": entry.unknown,
        "suggestion": entry.suggestion or None,
    }


def _task_model(path: str) -> Callable[[], Any]:
    from gradcentral.experiment.loading import load_task
    from gradcentral.experiment.task import Task

    task = load_task(path)
    if not isinstance(task, Task):
        raise ModelError(f"{path}: its task has a trainer of its own and names no model; give MODULE:NAME instead")
    return task.model


def _named_model(target: str) -> Callable[[], Any]:
    module_name, colon, expression = target.partition(":")
    if not (module_name and colon and expression):
        raise ModelError(f"{target}: give MODULE:NAME, such as torchvision.models:resnet18, or a task file")
    if os.getcwd() not in sys.path:  # as for python -m: modules of the folder one works in can be named
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"{target}: can't import {module_name} ({error})") from error
    names = _Names(module)

    def make() -> Any:
        found = eval(expression, {}, names)
        if isinstance(found, nn.Module) or not callable(found):
            return found
        config = getattr(found, "config_class", None)
        return found(config()) if config is not None else found()

    return make


class _Names(dict[str, Any]):
    """The names of a module, also those that it makes when they are asked for."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __missing__(self, name: str) -> Any:
        try:
            return getattr(self._module, name)
        except AttributeError:
            raise KeyError(name) from None
