"""The fingerprint of a task, so that runs of different tasks are never mixed: what a run computes, not its code.

It contains hashes of the data and of the initial weights, the settings, the versions of torch and gradcentral, and the
numbers of a reference run: the loss and the metric of the untrained model, and two training steps with each optimizer.
It is computed in every call, on one thread, and reports errors in the task before any run starts. It cannot notice a
change that neither touches the data nor the first two steps, such as another activation from the tenth epoch on.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from gradcentral.experiment.arms import NONE, CheckedArm
from gradcentral.experiment.data import Batches, epochs_of, evaluation_batches, single_last_example, steps_of
from gradcentral.experiment.determinism import approximately, derive, digest, one_thread, seed_everything
from gradcentral.experiment.errors import TaskError, naming, one_line
from gradcentral.experiment.loading import LoadedTask
from gradcentral.experiment.store import Key
from gradcentral.experiment.task import CustomTask, Task, is_loader
from gradcentral.experiment.training import Settings, Trainer, fresh_model, fresh_optimizer, fresh_schedule
from gradcentral.extras import own_version

__all__ = ["fingerprint"]

# Data in memory are hashed whole. Of other datasets, at most so many examples, evenly spaced, and of a loader so many
# batches: reading more from a disk could take as long as the comparison.
SAMPLED_EXAMPLES = 10_000
SAMPLED_BATCHES = 1_000
REFERENCE_STEPS = 2
# Every learning rate of a schedule with up to so many steps.
SCHEDULED_STEPS = 10_000


def fingerprint(
    loaded: LoadedTask, settings: Settings | None, optimizers: Sequence[str], arms: Sequence[str]
) -> dict[str, str]:
    """Describe the parts of the task, for `same`. This seeds the global random generators.

    Raises:
        TaskError: a part of the task is not usable; the message names it.
    """
    task = loaded.task
    parts: dict[str, str] = {"task": task.name, "torch": torch.__version__}
    parts |= {"gradcentral": own_version(), "metric": task.metric_name}
    parts["higher_is_better"] = str(task.higher_is_better)
    if isinstance(task, CustomTask):
        # What a custom trainer computes would take a whole run to find out.
        parts["source (without comments)"] = _digest_of_source(loaded.source or _source_of(task.run))
        return parts
    assert settings is not None
    with one_thread():
        return parts | _of_task(task, loaded, settings, optimizers, arms)


def _of_task(
    task: Task, loaded: LoadedTask, settings: Settings, optimizers: Sequence[str], arms: Sequence[str]
) -> dict[str, str]:
    parts: dict[str, str] = {name: str(value) for name, value in asdict(settings).items()}
    parts["device"] = torch.device(settings.device).type  # runs may continue on another GPU
    parts |= {name: str(getattr(task, name)) for name in ("batch_size", "drop_last", "metric_per_batch")}
    for part in ("train", "test"):
        with naming(part, loaded.file):
            parts[part] = _of_data(getattr(task, part))
    with naming("model", loaded.file):
        model = _paired_model(task)
        count = sum(parameter.numel() for parameter in model.parameters())
        weights = digest(model.state_dict())
        parts["model"] = f"{type(model).__name__} of {count} parameters, initial weights {weights}"
    for name in optimizers:
        with naming(f"optimizers[{name!r}]", loaded.file):
            parts[f"optimizers[{name!r}]"] = _of_optimizer(fresh_optimizer(task, name, model))
        with naming("schedule", loaded.file):
            parts[f"schedule of {name}"] = _of_schedule(task, name, model, steps_of(task, settings.epochs))
        for arm in arms:
            _check_arm(task, name, arm, model)
        with naming("the task cannot be trained", loaded.file):
            trainer = Trainer(task, settings, Key(name, NONE, seed=0))
            _check_last_batch(trainer)
        if name == optimizers[0]:
            with naming("the task cannot be evaluated", loaded.file):
                parts["untrained model: test loss, metric"] = _of_evaluation(trainer)
        with naming("the task cannot be trained", loaded.file):
            parts[f"two steps of {name}: losses, change of the weights"] = _of_steps(trainer)
    return parts


def _check_arm(task: Task, name: str, arm: str, model: nn.Module) -> None:
    """Raise a `TaskError` if the arm cannot be attached, for example because the model has nothing to center."""
    try:
        CheckedArm(arm, model, fresh_optimizer(task, name, model))
    except ValueError as error:
        raise TaskError(f"optimizers[{name!r}], arm {arm!r}: {one_line(error)}") from error


def _of_data(data: Any) -> str:
    seed_everything(0)  # augmentation draws random numbers
    if is_loader(data):
        batches = islice(Batches(data, 1, seed=0), SAMPLED_BATCHES)
        return f"{len(data)} batches, content {digest([*map(digest, batches)])}"
    if type(data) is TensorDataset:
        return f"{len(data)} examples, content {digest(data.tensors)}"
    step = 1 if isinstance(data, (list, tuple)) else math.ceil(len(data) / SAMPLED_EXAMPLES)
    return f"{len(data)} examples, content {digest([digest(data[i]) for i in range(0, len(data), step)])}"


def _paired_model(task: Task) -> nn.Module:
    """Build the model, and check that it can be built again."""
    model, again = (fresh_model(task, seed=0) for _ in range(2))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained & {id(parameter) for parameter in again.parameters()}:
        raise TaskError(
            "model: two calls of the factory returned the same parameters, so a run would continue where another "
            f"ended; build everything inside the factory, for example model=lambda: {type(model).__name__}(...)"
        )
    if digest(again.state_dict()) != digest(model.state_dict()):
        raise TaskError(
            "model: two calls under one seed gave different initial weights, so runs could not be paired; "
            "draw all random numbers from torch, NumPy or random, without setting a seed"
        )
    return model


def _of_optimizer(optimizer: Optimizer) -> str:
    groups = [
        ", ".join(f"{k}={_text(v)}" for k, v in group.items() if k != "params" and v is not None and v is not False)
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({' | '.join(groups)})"


def _text(value: Any) -> str:
    """Return the value as text, or its hash if the text of an object may contain its address."""
    return str(value) if isinstance(value, (bool, int, float, complex, str, tuple, list, Tensor)) else digest(value)


def _of_schedule(task: Task, name: str, model: nn.Module, steps: int) -> str:
    optimizer = fresh_optimizer(task, name, model)
    if (schedule := fresh_schedule(task, optimizer, steps)) is None:
        return "none"
    options = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # there is no step of the optimizer
        for _ in range(min(steps, SCHEDULED_STEPS)):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            options.append(digest(groups))
            schedule.step()
    return f"{type(schedule).__name__}, learning rates {digest(options)}"


def _of_evaluation(trainer: Trainer) -> str:
    """Evaluate on the first test batch, or on the whole set if the metric needs it, as ROC AUC needs two classes."""
    seed_everything(0)
    batches = evaluation_batches(trainer.task)
    try:
        return approximately(*trainer.evaluate(batches, limit=1))
    except TaskError:
        raise
    except Exception:
        if len(batches) == 1:
            raise
    return approximately(*trainer.evaluate(batches))


def _of_steps(trainer: Trainer) -> str:
    trainer.model.train()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    seed_everything(derive(trainer.seed, "training"))
    batches = islice(next(epochs_of(trainer.task, trainer.seed)), REFERENCE_STEPS)
    losses = [float(trainer.step(batch, effects=[])) for batch in batches]
    change = [_norm(p.detach() - b) for p, b in zip(trainer.model.parameters(), before, strict=True)]
    return approximately(*losses, math.hypot(*change))


def _check_last_batch(trainer: Trainer) -> None:
    """Raise a `TaskError` if the last batch of each epoch has one example and the model, as BatchNorm, needs more."""
    if (batch := single_last_example(trainer.task)) is None:
        return
    try:
        with torch.no_grad():
            trainer.forward(batch)
    except Exception as error:
        raise TaskError(
            f"train: the last batch of an epoch has a single example, which the model refuses ({one_line(error)}); "
            "set drop_last=True"
        ) from error


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)))


def _source_of(function: Any) -> str:
    """Return the source that `inspect` finds, or a name that is the same in every process."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        kind = function if hasattr(function, "__qualname__") else type(function)
        return f"{kind.__module__}.{kind.__qualname__}"


def _digest_of_source(source: str | bytes) -> str:
    try:
        return digest(ast.dump(ast.parse(source)))  # comments and blank lines do not count
    except SyntaxError:  # a lambda's source is the surrounding lines, which may not parse
        return digest(source)
