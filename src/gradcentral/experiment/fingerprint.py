"""The fingerprint of a task, so that runs of a changed task are never mixed.

It contains the source of the task's file (for a task from memory, the sources that `inspect` finds), its settings and
a hash of its data. If a run is missing, a model is built, and the initial weights and the optimizers are added.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcentral.experiment.determinism import digest, seed_everything
from gradcentral.experiment.errors import TaskError, naming
from gradcentral.experiment.loading import LoadedTask
from gradcentral.experiment.task import CustomTask, Task, name_of
from gradcentral.experiment.training import Settings, fresh_model, fresh_optimizer, fresh_schedule, pair_of, steps_of

__all__ = ["fingerprint_of_model", "fingerprint_of_task"]

# Enough examples to detect changed data, few enough to read from a slow disk.
SAMPLED_EXAMPLES = 64


def fingerprint_of_task(loaded: LoadedTask, settings: Settings | None) -> dict[str, str]:
    """Describe the task's source, settings and data, without a model. This seeds the global random generators."""
    task = loaded.task
    parts = {"task": task.name, "higher_is_better": str(task.higher_is_better)}
    if loaded.file is not None:
        parts["source of the task's file (without comments)"] = _digest_of_source(loaded.source)
    if isinstance(task, CustomTask):
        return parts | {"run": _of_function(task.run), "metric_name": task.metric_name}
    assert settings is not None
    parts |= {name: str(value) for name, value in asdict(settings).items()} | {"batch_size": str(task.batch_size)}
    parts |= {name: _of_function(getattr(task, name)) for name in ("loss", "metric")}
    parts["schedule"] = "none" if task.schedule is None else _of_function(task.schedule)
    for part in ("train", "test"):
        with naming(part, loaded.file):
            parts[part] = _of_dataset(getattr(task, part))
    return parts


def fingerprint_of_model(loaded: LoadedTask, settings: Settings, optimizers: tuple[str, ...]) -> dict[str, str]:
    """Describe the model and the optimizers by building them as a run does. This seeds the global random generators."""
    task = loaded.task
    assert isinstance(task, Task)
    # Building everything here reports errors in the task before any worker starts.
    with naming("model", loaded.file):
        model, again = (fresh_model(task, seed=0) for _ in range(2))
    weights = digest(model.state_dict())
    if digest(again.state_dict()) != weights:
        raise TaskError(
            "model: two calls under one seed gave different initial weights, so runs could not be paired; "
            "draw all random numbers from torch, NumPy or random, without setting a seed"
        )
    parts = {"model": _of_model(model, weights)}
    for name in optimizers:
        with naming(f"optimizers[{name!r}]", loaded.file):
            optimizer = fresh_optimizer(task, name, model)
            parts[f"optimizers[{name!r}]"] = _of_optimizer(optimizer)
        with naming("schedule", loaded.file):
            fresh_schedule(task, optimizer, steps_of(task, settings.epochs))
    return parts


def _of_model(model: nn.Module, weights: str) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    # str(model) lists the layers, but not the computations of a user's forward between them.
    own = {type(module).forward for module in model.modules() if not type(module).__module__.startswith("torch.")}
    structure = digest([str(model), *sorted(map(_source_of, own))])
    return f"{type(model).__name__} of {count} parameters, structure {structure}, initial weights {weights}"


def _of_dataset(dataset: Any) -> str:
    seed_everything(0)  # augmentation draws random numbers
    sample = [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // SAMPLED_EXAMPLES))]
    if not isinstance(sample[0], Mapping):
        pair_of(sample[0])
    return f"{len(dataset)} examples, content {digest(sample)}"


def _of_optimizer(optimizer: Optimizer) -> str:
    groups = [
        ", ".join(f"{k}={v}" for k, v in group.items() if k != "params" and v is not None and v is not False)
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({' | '.join(groups)})"


def _of_function(function: Any) -> str:
    return f"{name_of(function)}, source {_digest_of_source(_source_of(function))}"


def _source_of(value: Any) -> str:
    """Return the source that `inspect` finds, or a name that is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, functools.partial):
        return "\n".join(map(_source_of, [value.func, *value.args, *value.keywords, *value.keywords.values()]))
    if not (inspect.isroutine(value) or inspect.isclass(value)):  # an instance, such as nn.CrossEntropyLoss()
        settings = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, (bool, int, float, str))}
        return f"{_source_of(type(value))}\n{settings}"
    name = f"{value.__module__}.{value.__qualname__}"
    if name.startswith("torch."):  # a new version of torch does not change the task
        return name
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        return name


def _digest_of_source(source: str | bytes) -> str:
    try:
        return digest(ast.dump(ast.parse(source)))  # comments and blank lines do not count
    except SyntaxError:  # a lambda's source is the surrounding lines, which may not parse
        return digest(source)
