"""Common parts of all figures: the training runs of a task, inspected at every step, and a figure with its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.attach import centralize
from gradcentral.diagnostics.batches import loss_of, to_device
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.experiment import data, training
from gradcentral.experiment.arms import NONE
from gradcentral.experiment.determinism import derive, seed_everything
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.task import Task
from gradcentral.layout import Entry, WeightLayout, weight_layout
from gradcentral.plotting import LIGHT, new_figure, style, to_png, to_svg
from gradcentral.tables import csv_text

__all__ = ["Figure", "Study", "TrainingStep", "drawing", "gradient_of", "layer_label", "put_legend"]


class TrainingStep(NamedTuple):
    """A training step between its backward pass and the optimizer's step: ``p.grad`` is the raw gradient."""

    number: int
    model: nn.Module
    layout: WeightLayout
    batch: Any
    loss: float


@dataclass(frozen=True)
class Study:
    """A task and the settings of the runs that the figures show."""

    task: Task
    source: Task | str | Path  # the task as passed by the user, for worker processes
    optimizer: str  # the name of one of the task's optimizers
    seeds: tuple[int, ...]  # figures with intervals use all; figures of a single run use the first
    epochs: int
    device: str = "cpu"
    runs: Path = Path("runs")  # the output folder of a comparison
    progress: bool = False
    weights: Mapping[str, Tensor] | None = None  # the centered parameters of the network after training, by name
    # A function that returns the iterable and shows its progress.
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda iterable, total: iterable

    @property
    def seed_label(self) -> str:
        """The number of seeds in words: "1 seed", "5 seeds"."""
        return f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"

    @property
    def steps(self) -> int:
        """The number of steps per run."""
        return data.steps_of(self.task, self.epochs)

    def fresh_model(self) -> nn.Module:
        """Build the initial model of a run of the first seed, without changing the global generators."""
        with preserve_state():
            return training.fresh_model(self.task, self.seeds[0]).to(self.device)

    def batches(self, seed: int) -> Iterator[Any]:
        """Yield all batches of a run in order, the same as in a comparison."""
        for batches in itertools.islice(data.epochs_of(self.task, seed), self.epochs):
            for batch in batches:
                yield to_device(batch, self.device)

    def train(self, arm: str, seed: int, steps: int | None = None) -> Iterable[TrainingStep]:
        """Train an arm as a comparison does, for all epochs or some steps; yield after each backward pass."""
        steps = self.steps if steps is None else steps
        return self.track(itertools.islice(self._train(arm, seed), steps), steps)

    def _train(self, arm: str, seed: int) -> Iterator[TrainingStep]:
        with preserve_state():
            model = training.fresh_model(self.task, seed).to(self.device)
            optimizer = training.fresh_optimizer(self.task, self.optimizer, model)
            schedule = training.fresh_schedule(self.task, optimizer, self.steps)
            layout = weight_layout(model) if arm == NONE else centralize(optimizer, model, arm).layout
            seed_everything(derive(seed, "training"))
            for index, batch in enumerate(self.batches(seed)):
                optimizer.zero_grad()
                loss = loss_of(model, self.task.loss, batch)
                torch.autograd.backward(loss)
                yield TrainingStep(index, model, layout, batch, float(loss.detach()))
                optimizer.step()
                if schedule is not None:
                    schedule.step()

    @cached_property
    def example_layers(self) -> tuple[Entry, ...]:
        """Two layers to show: the largest convolution and the largest linear layer, or the two largest layers."""
        layout = weight_layout(self.fresh_model())
        centered = [entry for entry in layout.entries if entry.vectors is not None and entry.parameter.requires_grad]
        by_size = sorted(centered, key=lambda entry: -entry.parameter.numel())
        convolutions = [entry for entry in by_size if entry.parameter.ndim > 2]
        matrices = [entry for entry in by_size if entry.parameter.ndim == 2]
        return tuple(dict.fromkeys([*convolutions[:1], *matrices[:1], *by_size]))[:2]


def layer_label(entry: Entry) -> str:
    """Return the kind and name of a layer, such as "convolution 4.weight"."""
    return f"{'convolution' if entry.parameter.ndim > 2 else 'linear'} {entry.name}"


def gradient_of(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, dense; zero if the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().to_dense()


class Figure(NamedTuple):
    """A matplotlib figure with its title, and the plotted numbers as a table."""

    title: str
    image: Any
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def write(self, folder: OutputFolder, name: str) -> None:
        """Write ``name.png``, ``name.svg`` and ``name.csv`` into a folder."""
        folder.write(f"{name}.png", to_png(self.image, self.title))
        folder.write(f"{name}.svg", to_svg(self.image))
        folder.write(f"{name}.csv", csv_text([self.header, *self.rows]))


@contextmanager
def drawing(height: float) -> Iterator[Any]:
    """Yield a new figure of the width of a page, to be drawn in the block."""
    with style(LIGHT):
        yield new_figure(9.8, height)


def put_legend(figure: Any, axis: Any) -> None:
    """Put the legend of an axis next to the figure's title."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(handles), frameon=False)
