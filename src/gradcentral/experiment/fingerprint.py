"""What a comparison's runs are runs of, part by part, so that results of a changed task are never mixed."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.digest import digest, digest_of_callable, digest_of_source
from gradcentral.experiment.errors import ExperimentError, TaskError
from gradcentral.experiment.loading import TaskReference, describe, where
from gradcentral.experiment.randomness import seed_everything
from gradcentral.experiment.task import CustomTask, Task, name_of
from gradcentral.experiment.training import Settings, fresh_model, fresh_optimizer, fresh_schedule

__all__ = ["fingerprint"]

# Enough examples to notice other data, few enough to read from a slow disk.
SAMPLED_EXAMPLES = 64


def fingerprint(reference: TaskReference, settings: Settings | None, optimizers: tuple[str, ...]) -> dict[str, str]:
    """Part of the task -> what it is, in words a person can compare, ending in a hash where words do not suffice.

    It builds everything a run builds, so that a task that can't run is noticed before any worker starts.

    Raises:
        TaskError: a part of the task raises, or is not what it must be; the message names the part.
    """
    task = reference.task
    parts = {"task": task.name}
    if reference.source is not None:
        parts["code of the task's file (comments do not count)"] = digest_of_source(reference.source)
    with preserve_state():
        if isinstance(task, CustomTask):
            return parts | _of_custom(task)
        assert settings is not None
        return parts | _of_task(task, settings, optimizers, reference)


def _of_custom(task: CustomTask) -> dict[str, str]:
    return {
        "run": f"{name_of(task.run)}, code {digest_of_callable(task.run)}",
        "metric_name": task.metric_name,
        "higher_is_better": str(task.higher_is_better),
    }


def _of_task(task: Task, settings: Settings, optimizers: tuple[str, ...], reference: TaskReference) -> dict[str, str]:
    part = "model"
    try:
        model = fresh_model(task, seed=0)
        weights = digest(model.state_dict())
        if digest(fresh_model(task, seed=0).state_dict()) != weights:
            raise TaskError(
                "model: two calls under one seed gave different initial weights, so that runs could not be paired; "
                "draw all random numbers from torch, NumPy or random, without a seed of its own"
            )
        parts = {
            "epochs": str(settings.epochs),
            "batch_size": str(task.batch_size),
            "device": settings.device,
            "amp": str(settings.amp),
            "model": _of_model(model, weights),
            "loss": f"{name_of(task.loss)}, code {digest_of_callable(task.loss)}",
            "metric": f"{task.metric_name}, code {digest_of_callable(task.metric)}",
            "higher_is_better": str(task.higher_is_better),
        }
        for part in ("train", "test"):
            parts[part] = _of_dataset(getattr(task, part))
        for name in optimizers:
            part = f"optimizers[{name!r}]"
            optimizer = fresh_optimizer(task, name, model)
            parts[part] = _of_optimizer(optimizer)
            part = "schedule"
            batches = math.ceil(len(task.train) / task.batch_size)  # type: ignore[arg-type]
            fresh_schedule(task, optimizer, steps=settings.epochs * batches)
        parts[part] = "none" if task.schedule is None else f"code {digest_of_callable(task.schedule)}"
    except ExperimentError:
        raise
    except Exception as error:
        raise TaskError(f"{part}: {describe(error)} ({where(error, reference.source)})") from error
    return parts


def _of_model(model: nn.Module, weights: str) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    # What the modules compute: their text tells the layers, not the code between them.
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    code = sorted(f"{cls.__qualname__} {digest_of_callable(cls.forward)}" for cls in own)
    structure = digest([str(model), code])
    return f"{type(model).__name__} of {count} parameters, structure {structure}, initial weights {weights}"


def _of_dataset(dataset: Any) -> str:
    seed_everything(0)  # augmentation draws random numbers
    step = max(1, len(dataset) // SAMPLED_EXAMPLES)
    sample = [dataset[index] for index in range(0, len(dataset), step)]
    return f"{len(dataset)} examples, content {digest(sample)}"


def _of_optimizer(optimizer: Optimizer) -> str:
    groups = [
        ", ".join(f"{name}={value}" for name, value in group.items() if name != "params" and _is_set(value))
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({' | '.join(groups)})"


def _is_set(value: object) -> bool:
    return value is not None and value is not False
