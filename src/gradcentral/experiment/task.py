"""A `Task` to train, or a `CustomTask` that wraps a user's own trainer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset

from gradcentral.experiment.errors import TaskError, one_line

__all__ = ["CustomTask", "Task", "check_count", "check_seed_count", "is_loader", "name_of"]

MOST_EXAMPLES = 100_000_000
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizers, to be trained with and without Gradient Centralization.

    Args:
        name: name of the task and of its output folder.
        model: function that builds a fresh model; called once per run, with the run's seed set.
        train: training data: a dataset of examples, or a ``DataLoader`` (or anything else with a length that can be
            iterated in every epoch) of batches. An example, and so a batch, is ``(input, target)``;
            ``(input, …, target)`` for a model with several inputs; or a mapping with the arguments of the model.
        test: test data in the same form, which are never trained on.
        loss: ``loss(output, target)`` -> scalar tensor, the mean over the batch. If the batches are mappings, the
            model is called as ``model(**batch)`` and the target is the batch itself.
        metric: ``metric(output, target)`` -> number. It is called once per evaluation, with the outputs and targets of
            the whole test set, on the CPU: F1, AUC and perplexity are those of the test set. The metric is named after
            the callable.
        optimizers: name -> ``factory(parameters)`` -> a plain ``torch.optim.Optimizer``, without GC.
        batch_size: examples of a dataset per step. Evaluation uses four times as many at once.
        epochs: passes over the training data.
        schedule: ``schedule(optimizer, steps)`` -> ``LRScheduler``, stepped once per batch; ``steps`` is the total
            number of batches.
        higher_is_better: whether a larger metric is better.
        collate: ``collate(examples)`` -> batch, for datasets; by default that of a ``DataLoader``.
        drop_last: whether an epoch leaves out a last batch with fewer than ``batch_size`` examples.
        metric_per_batch: call the metric on each test batch, and use the mean over the test examples, where the outputs
            for the whole test set would not fit into memory.

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
    train: Any  # a Dataset, a list of examples, a DataLoader …
    test: Any
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor | float]
    optimizers: Mapping[str, Callable[[Iterable[nn.Parameter]], Optimizer]]
    batch_size: int = 32
    epochs: int = 10
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None
    higher_is_better: bool = True
    collate: Callable[[list[Any]], Any] | None = None
    drop_last: bool = False
    metric_per_batch: bool = False

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
        functions = {name: getattr(self, name) for name in ("model", "loss", "metric", "schedule", "collate")}
        functions |= {f"optimizers[{name!r}]": factory for name, factory in self.optimizers.items()}
        for name, function in functions.items():
            optional = name in ("schedule", "collate") and function is None
            _require(optional or callable(function), f"{name}: give a function, not {function!r}")
        for name in ("drop_last", "metric_per_batch"):
            _require(isinstance(value := getattr(self, name), bool), f"{name}: give True or False, not {value!r}")
        for name in ("train", "test"):
            _check_data(name, getattr(self, name))
        check_count("batch_size", self.batch_size)
        check_count("epochs", self.epochs)
        self._check_options_of_datasets()

    def _check_options_of_datasets(self) -> None:
        """Refuse options that would be ignored, because loaders set them, and an epoch without a batch."""
        loaders = [is_loader(self.train), is_loader(self.test)]
        ignored = {
            "batch_size": all(loaders) and self.batch_size != Task.batch_size,
            "collate": all(loaders) and self.collate is not None,
            "drop_last": loaders[0] and self.drop_last,
        }
        for name in (name for name in ignored if ignored[name]):
            option = "collate_fn" if name == "collate" else name
            raise TaskError(f"{name}: has no effect on the batches of a DataLoader; pass {option}= to the DataLoader")
        if self.drop_last and len(self.train) < self.batch_size:
            raise TaskError(
                f"drop_last: train has fewer examples than a batch of {self.batch_size}, so no batch would be left; "
                "lower batch_size"
            )

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


def is_loader(data: object) -> bool:
    """Whether the data give batches, as a ``DataLoader`` does, rather than examples by index."""
    return not hasattr(data, "__getitem__")


def check_count(field: str, value: object) -> None:
    """Raise a `TaskError` unless the value is a positive integer."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(valid, f"{field}: give an integer of at least 1, not {value!r}")


def check_seed_count(value: object) -> None:
    """Raise a `TaskError` unless the value is a number of seeds."""
    check_count("seeds", value)
    # A date or another large number is meant as a seed.
    _require(
        isinstance(value, int) and value <= MOST_SEEDS,
        f"seeds: {value} is a number of seeds, which may be at most {MOST_SEEDS}; a list such as [0, 3, 7] gives the "
        "seeds themselves (on the command line: 0,3,7)",
    )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise TaskError(message)


def _check_data(name: str, data: Any) -> None:
    kind = type(data).__name__
    _require(
        not isinstance(data, IterableDataset),
        f"{name}: {kind} is an IterableDataset, which gives no example by its index; "
        f"give a loader of it: {name}=DataLoader(dataset, batch_size=32)",
    )
    _require(not isinstance(data, Iterator), f"{name}: a {kind} can be read only once; give a Dataset or a DataLoader")
    _require(
        hasattr(data, "__getitem__") or hasattr(data, "__iter__"),
        f"{name}: a {kind} has no length and index; give a Dataset of (input, target) pairs, such as "
        "TensorDataset(inputs, targets), or a DataLoader",
    )
    try:
        length = len(data)
    except Exception as error:
        raise TaskError(
            f"{name}: the length of the {kind} is unknown ({one_line(error)}); define __len__ in the dataset"
        ) from error
    _require(length > 0, f"{name}: the dataset is empty")
    _require(
        length <= MOST_EXAMPLES,
        f"{name}: the {kind} has {length:,} examples, more than the {MOST_EXAMPLES:,} whose order fits into memory; "
        f"use some of them: {name}=torch.utils.data.Subset(dataset, range(1_000_000))",
    )


def _check_name_and_direction(task: Task | CustomTask) -> None:
    valid = isinstance(task.name, str) and re.fullmatch(r"\w[\w .+-]*", task.name)
    _require(valid, f"name: {task.name!r} cannot name a folder; use letters, digits, '-', '_', '.', '+' and spaces")
    direction = task.higher_is_better
    _require(isinstance(direction, bool), f"higher_is_better: give True or False, not {direction!r}")
