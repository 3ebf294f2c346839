"""The batches of a task, from a dataset in a seeded order or from the user's own loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gradcentral.experiment.determinism import derive, seed_everything
from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.task import Task, is_loader

__all__ = ["Batches", "end_workers", "epochs_of", "evaluation_batches", "single_last_example", "steps_of"]


class Batches:
    """One pass over a dataset or a loader; iterate over it for the batches, or over `sized` for their sizes too."""

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        order: Sequence[int] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        """Read ``data`` in this order; a loader has its own batches, and draws its random numbers with this seed."""
        self.order = order
        self.examples: int | None = None
        """The number of examples; None for a loader."""
        self._loader, self._size, self._seed = data, batch_size, seed
        if not is_loader(data):
            self.examples = len(data if order is None else order)
            # A generator of its own, so that loading draws nothing from torch's global one.
            options: dict[str, Any] = {
                "collate_fn": collate,
                "drop_last": drop_last,
                "generator": torch.Generator("cpu"),
            }
            self._loader = DataLoader(data, batch_size, sampler=order, **options)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for _, batch in self.sized():
            yield batch

    def sized(self) -> Iterator[tuple[int, Any]]:
        """Yield every batch after its number of examples."""
        if self._seed is not None:
            seed_everything(self._seed)
            _seed_loader(self._loader, self._seed)
        index = -1
        with torch.device("cpu"):  # torch draws a seed on the default device, although the generator is on the CPU
            batches = iter(self._loader)
        for index, batch in enumerate(batches):
            size = _size_of(batch) if self.examples is None else min(self._size, self.examples - index * self._size)
            yield size, batch
        if index < 0:
            kind = type(self._loader).__name__
            raise TaskError(f"train and test: a {kind} gave no batch; it must give all of its batches in every epoch")


def epochs_of(task: Task, seed: int) -> Iterator[Batches]:
    """Yield the training batches of each epoch of a run, indefinitely."""
    options: dict[str, Any] = {"collate": task.collate, "drop_last": task.drop_last}
    if is_loader(task.train):
        for epoch in count(1):
            yield Batches(task.train, task.batch_size, seed=derive(seed, f"epoch {epoch}"))
    generator = torch.Generator("cpu").manual_seed(derive(seed, "order"))
    while True:
        order = torch.randperm(len(task.train), generator=generator, device="cpu").tolist()
        yield Batches(task.train, task.batch_size, order=order, **options)


def evaluation_batches(task: Task) -> Batches:
    """Return the test batches, four times as large as those of training, since no gradients are kept."""
    return Batches(task.test, 4 * task.batch_size, collate=task.collate)


def steps_of(task: Task, epochs: int) -> int:
    """Return the number of steps in a run."""
    batches = len(task.train)
    if not is_loader(task.train):
        batches = batches // task.batch_size if task.drop_last else math.ceil(batches / task.batch_size)
    return epochs * batches


def single_last_example(task: Task) -> Any | None:
    """Return a batch of one if every epoch ends with such a batch; None otherwise."""
    data, size, collate, drop_last = task.train, task.batch_size, task.collate, task.drop_last
    sampler: Any = data
    if isinstance(data, DataLoader):
        size, collate, drop_last = data.batch_size or 0, data.collate_fn, data.drop_last
        sampler, data = data.sampler, data.dataset
    if is_loader(data) or isinstance(data, IterableDataset) or size < 2 or drop_last:
        return None
    return next(iter(Batches(data, 1, order=[0], collate=collate))) if len(sampler) % size == 1 else None


def _seed_loader(loader: Any, seed: int) -> None:
    """Let the next pass over a loader draw the random numbers of this seed, in its samplers and its workers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    for holder in (loader, *samplers):
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            generator.manual_seed(seed)
    end_workers(loader)  # torch seeds each worker only once


def end_workers(loader: Any) -> None:
    """End the persistent workers of a loader; its next pass starts new ones."""
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None


def _size_of(value: Any) -> int:
    """Return the length of the first tensor in a batch; 1 if there is none, so that all batches count alike."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((size for item in items if (size := _size_of(item)) > 1), 1)
