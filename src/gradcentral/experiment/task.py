"""A `Task` to train, or a `CustomTask` that wraps a user's own trainer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from gradcentral.experiment.errors import TaskError

__all__ = ["CustomTask", "Task", "check_count", "name_of"]


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizers, to be trained with and without Gradient Centralization.

    Args:
        name: name of the task and of its output folder.
        model: function that builds a fresh model; called once per run, with the run's seed set.
        train: training examples: pairs ``(input, target)``, or mappings with the arguments of the model.
        test: test examples in the same form, which are never trained on.
        loss: ``loss(output, target)`` -> scalar tensor, the mean over the batch. If the examples are mappings, the
            model is called as ``model(**batch)`` and the target is the batch itself.
        metric: ``metric(output, target)`` -> number, the mean over the batch. The metric is named after the callable.
        optimizers: name -> ``factory(parameters)`` -> a plain ``torch.optim.Optimizer``, without GC.
        batch_size: examples per step. Evaluation uses four times as many at once.
        epochs: passes over the training examples.
        schedule: ``schedule(optimizer, steps)`` -> ``LRScheduler``, stepped once per batch; ``steps`` is the total
            number of batches.
        higher_is_better: whether a larger metric is better.

    Raises:
        TaskError: a field is not usable; the message names it.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(64, 3)
        >>> task = Task(
        ...     name="line",
        ...     model=lambda: torch.nn.Linear(3, 2),
        ...     train=TensorDataset(x[:32], x[:32, :2]),
        ...     test=TensorDataset(x[32:], x[32:, :2]),
        ...     loss=torch.nn.functional.mse_loss,
        ...     metric=torch.nn.functional.l1_loss,
        ...     optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.1)},
        ...     higher_is_better=False,
        ... )
        >>> task.metric_name
        'l1_loss'
    """

    name: str
    model: Callable[[], nn.Module]
    train: Dataset[Any]
    test: Dataset[Any]
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor | float]
    optimizers: Mapping[str, Callable[[Iterable[nn.Parameter]], Optimizer]]
    batch_size: int = 32
    epochs: int = 10
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        _check_name_and_direction(self)
        _require(
            not isinstance(self.model, nn.Module),
            "model: give a function that builds a fresh model, not a model (every run needs a new one), "
            f"for example model=lambda: {type(self.model).__name__}(...)",
        )
        _require(
            isinstance(self.optimizers, Mapping) and bool(self.optimizers),
            "optimizers: give at least one, as {'sgd': lambda params: torch.optim.SGD(params, lr=0.1)}",
        )
        for name, factory in self.optimizers.items():
            # On the command line, names are separated by commas.
            valid = isinstance(name, str) and re.fullmatch(r"[^\s,]+", name)
            _require(valid, f"optimizers: {name!r} is not a name; use a string without spaces and commas")
            _require(
                not isinstance(factory, Optimizer),
                f"optimizers[{name!r}]: give a function of the parameters, not an optimizer, "
                f"for example lambda params: torch.optim.{type(factory).__name__}(params, ...)",
            )
        functions = {name: getattr(self, name) for name in ("model", "loss", "metric", "schedule")}
        functions |= {f"optimizers[{name!r}]": factory for name, factory in self.optimizers.items()}
        for name, function in functions.items():
            optional = name == "schedule" and function is None
            _require(optional or callable(function), f"{name}: give a function, not {function!r}")
        for name, dataset in (("train", self.train), ("test", self.test)):
            _require(
                hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"),
                f"{name}: a {type(dataset).__name__} has no length and index; give a map-style Dataset "
                "of (input, target) pairs, such as TensorDataset(inputs, targets)",
            )
            _require(len(dataset) > 0, f"{name}: the dataset is empty")  # type: ignore[arg-type]
        check_count("batch_size", self.batch_size)
        check_count("epochs", self.epochs)

    @property
    def metric_name(self) -> str:
        """The name of the metric's callable."""
        return name_of(self.metric)


@dataclass(frozen=True)
class CustomTask:
    """A user's own trainer, which is given a seed and an arm and reports every epoch.

    Such a trainer must itself pair its runs (same initial weights, same data order for one seed) and attach GC as the
    arm requires. The comparison cannot check either.

    Args:
        name: name of the task and of its output folder.
        run: ``run(seed, arm)`` -> one mapping per epoch, with the numbers ``train_loss`` and ``test_metric``, and
            optionally ``test_loss`` and ``train_metric``. A generator updates the progress display after each epoch.
            ``arm`` is ``"none"`` or the ``placement`` to pass to `gradcentral.centralize`.
        metric_name: name of ``test_metric``.
        higher_is_better: whether a larger metric is better.

    Raises:
        TaskError: a field is not usable; the message names it.

    Examples:
        >>> def run(seed, arm):
        ...     yield {"train_loss": 0.5, "test_metric": 0.9}
        >>> CustomTask("mine", run).metric_name
        'metric'
    """

    name: str
    run: Callable[[int, str], Iterable[Mapping[str, float]]]
    metric_name: str = "metric"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        _check_name_and_direction(self)
        _require(callable(self.run), f"run: give a function, not {self.run!r}")
        valid = isinstance(self.metric_name, str) and self.metric_name
        _require(valid, f"metric_name: give a string, not {self.metric_name!r}")


def name_of(function: object) -> str:
    """Return a callable's name: its own, that of the function a ``partial`` wraps, or that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def check_count(field: str, value: object) -> None:
    """Raise a `TaskError` unless the value is a positive integer."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(valid, f"{field}: give an integer of at least 1, not {value!r}")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise TaskError(message)


def _check_name_and_direction(task: Task | CustomTask) -> None:
    valid = isinstance(task.name, str) and re.fullmatch(r"\w[\w .+-]*", task.name)
    _require(valid, f"name: {task.name!r} cannot name a folder; use letters, digits, '-', '_', '.', '+' and spaces")
    direction = task.higher_is_better
    _require(isinstance(direction, bool), f"higher_is_better: give True or False, not {direction!r}")
