"""Training a task while looking at every step: what the figures are made from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradcentral.attach import centralize
from gradcentral.diagnostics.batches import to_device
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.randomness import derive, seed_everything
from gradcentral.experiment.task import Task
from gradcentral.experiment.training import fresh_model, fresh_optimizer, fresh_schedule, loader_of, orders_of, pair_of
from gradcentral.layout import Entry, WeightLayout, weight_layout

__all__ = ["Batch", "Moment", "Study"]

Batch = tuple[Any, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Moment:
    """A training step between its backward pass and the optimizer's step: ``p.grad`` is as autograd left it.

    Attributes:
        step: counted from 0.
        model, layout: in training.
        batch: ``(input, target)`` that the gradients are of.
        loss: on it.
    """

    step: int
    model: nn.Module
    layout: WeightLayout
    batch: Batch
    loss: float


@dataclass(frozen=True)
class Study:
    """A task, and how the figures train it.

    Attributes:
        task: what is trained.
        source: where it came from, for worker processes.
        optimizer: the name of one of its optimizers.
        seeds: for numbers with a spread; figures of a single run take the first.
        epochs: of each run.
        track: shows progress: ``track(iterable, total)`` yields what the iterable does.
        device: where, as torch names it.
    """

    task: Task
    source: Task | str | Path
    optimizer: str
    seeds: tuple[int, ...]
    epochs: int
    track: Callable[[Iterable[Any], int], Iterable[Any]]
    device: str = "cpu"

    @property
    def seed(self) -> int:
        """The first seed."""
        return self.seeds[0]

    @property
    def runs(self) -> str:
        """In words, how many seeds there are."""
        return f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"

    @property
    def steps(self) -> int:
        """How many a run takes."""
        train: Any = self.task.train
        return self.epochs * math.ceil(len(train) / self.task.batch_size)

    def fresh_model(self) -> nn.Module:
        """The model as a run of the first seed begins with it; nobody's random numbers change."""
        with preserve_state():
            return fresh_model(self.task, self.seed).to(self.device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """All batches of a run in its order, the same as in a comparison."""
        for order in itertools.islice(orders_of(self.task, seed), self.epochs):
            for batch in loader_of(self.task, order):
                yield to_device(pair_of(batch), self.device)

    def train(self, arm: str, seed: int) -> Iterator[Moment]:
        """Train once: yields after each backward pass, and steps when it is resumed.

        Runs of one seed start from the same weights and see the same batches, as in a comparison.

        Args:
            arm: ``"none"``, ``"gradient"`` or ``"update"``.
            seed: of weights, order and dropout.
        """
        task = self.task
        with preserve_state():
            model = fresh_model(task, seed).to(self.device)
            optimizer = fresh_optimizer(task, self.optimizer, model)
            schedule = fresh_schedule(task, optimizer, self.steps)
            layout = weight_layout(model) if arm == NONE else centralize(optimizer, model, arm).layout
            seed_everything(derive(seed, "training"))
            for step, batch in enumerate(self.batches(seed)):
                optimizer.zero_grad()
                loss = task.loss(model(batch[0]), batch[1])
                loss.backward()  # type: ignore[no-untyped-call]
                yield Moment(step, model, layout, batch, float(loss.detach()))
                optimizer.step()
                if schedule is not None:
                    schedule.step()

    @cached_property
    def examples(self) -> tuple[Entry, ...]:
        """A convolution and a linear layer to look at: the largest of each kind, or the two largest there are."""
        layout = weight_layout(self.fresh_model())
        centered = [entry for entry in layout.entries if entry.vectors is not None and entry.parameter.requires_grad]
        by_size = sorted(centered, key=lambda entry: -entry.parameter.numel())
        convolution = next((entry for entry in by_size if entry.parameter.ndim > 2), None)
        linear = next((entry for entry in by_size if entry.parameter.ndim == 2), None)
        chosen = [entry for entry in (convolution, linear) if entry is not None]
        return tuple(chosen + [entry for entry in by_size if entry not in chosen])[: max(len(chosen), 2)]


def kind_of(entry: Entry) -> str:
    """What a person calls such a layer."""
    return "convolution" if entry.parameter.ndim > 2 else "linear"


def gradient_of(parameter: Tensor) -> Tensor:
    """A parameter's gradient, dense; zero where the loss did not reach it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().to_dense()
