"""One run: training with one optimizer, arm and seed, from fresh weights to the last epoch."""

from __future__ import annotations

import inspect
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import count, islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from gradcentral.diagnostics.batches import to_device
from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.experiment.arms import CheckedArm
from gradcentral.experiment.determinism import derive, digest, seed_everything
from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.task import CustomTask, Task

__all__ = [
    "Settings",
    "amp_dtype",
    "check_device",
    "fresh_model",
    "fresh_optimizer",
    "fresh_schedule",
    "loader_of",
    "orders_of",
    "pair_of",
    "steps_of",
    "train",
]


@dataclass(frozen=True)
class Settings:
    """Settings of every run of a comparison; see `compare`."""

    epochs: int
    device: str = "cpu"
    amp: bool = False


def train(task: Task | CustomTask, key: Key, settings: Settings | None, on_epoch: Callable[[int], None]) -> Run:
    """Train once and record every epoch; call ``on_epoch`` with the number of each.

    Two runs of one seed have the same initial weights and the same batches in the same order, regardless of arm and
    optimizer. At the first and the last step of every epoch the arm is checked (see `CheckedArm`). With a `CustomTask`,
    which has no ``settings``, the user is responsible for both. A loss or metric that is not finite ends the run early;
    divergence is a result, not an error.
    """
    started = time.perf_counter()
    seed_everything(key.seed)
    if isinstance(task, Task):
        assert settings is not None
        trainer = _Trainer(task, settings, key)
        weights, reports = digest(trainer.model.state_dict()), trainer.epochs()
    else:
        weights, reports = None, map(_checked, task.run(key.seed, key.arm), count(1))
    epochs: list[dict[str, Any]] = []
    diverged = False
    for epoch, numbers in enumerate(reports, start=1):
        epochs.append({"epoch": epoch, **numbers})
        on_epoch(epoch)
        if diverged := not _is_finite(numbers):
            break
    if not epochs:
        raise TaskError("run: reported no epoch; return or yield one mapping per epoch")
    return Run(
        *key,
        epochs=epochs,
        train_metric=None if diverged else epochs[-1].get("train_metric"),
        diverged_at=len(epochs) if diverged else None,
        seconds=time.perf_counter() - started,
        weights=weights,
        environment=_environment(settings),
    )


class _Loader(DataLoader[Any]):
    """A ``DataLoader`` that works under any default device."""

    def __iter__(self) -> Any:
        # torch draws a seed on the default device, although the generator is on the CPU.
        with torch.device("cpu"):
            return super().__iter__()


def fresh_model(task: Task, seed: int) -> nn.Module:
    """Build the model with a seed; lazy parameters are initialized from the first training batch."""
    seed_everything(seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model: the factory must return an nn.Module, not {type(model).__name__}")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        with torch.no_grad():
            _predict(model.eval(), next(iter(_Loader(task.train, task.batch_size))))
    return model.train()


def orders_of(task: Task, seed: int) -> Iterator[list[int]]:
    """Yield the order of the training examples in each epoch of a run, indefinitely."""
    generator = torch.Generator("cpu").manual_seed(derive(seed, "order"))
    while True:
        yield torch.randperm(len(task.train), generator=generator, device="cpu").tolist()  # type: ignore[arg-type]


def steps_of(task: Task, epochs: int) -> int:
    """Return the number of steps in a run."""
    return epochs * math.ceil(len(task.train) / task.batch_size)  # type: ignore[arg-type]


def loader_of(task: Task, order: Sequence[int]) -> DataLoader[Any]:
    """Load the batches of one epoch, without drawing from torch's global generator."""
    return _Loader(task.train, task.batch_size, sampler=order, generator=torch.Generator("cpu"))


def fresh_optimizer(task: Task, name: str, model: nn.Module) -> Optimizer:
    """Build the optimizer of that name for the model's trainable parameters."""
    optimizer = task.optimizers[name]([p for p in model.parameters() if p.requires_grad])
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TaskError(f"optimizers[{name!r}]: the factory must return a torch.optim.Optimizer, not {kind}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TaskError(
            f"optimizers[{name!r}]: the step of {kind} requires a closure, which a Task does not support; "
            "write the training loop yourself as a CustomTask"
        )
    return optimizer


def fresh_schedule(task: Task, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """Build the schedule over this many steps; None if the task has no schedule."""
    if task.schedule is None:
        return None
    schedule = task.schedule(optimizer, steps)
    if not isinstance(schedule, LRScheduler):
        raise TaskError(f"schedule: must return a torch LRScheduler, not {type(schedule).__name__}")
    return schedule


def check_device(device: str, amp: bool) -> None:
    """Raise a `TaskError` unless the device is available and, if requested, supports mixed precision."""
    try:
        torch.empty(1, device=device).add_(1)
    except Exception as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise TaskError(f"device: {device!r} is not available; choose from {available}") from error
    if amp and not torch.amp.autocast_mode.is_autocast_available(torch.device(device).type):
        raise TaskError(f"amp: torch does not support mixed precision on {device!r}; omit it")


class _Trainer:
    """The training loop of one run."""

    def __init__(self, task: Task, settings: Settings, key: Key) -> None:
        self.task, self.settings, self.seed = task, settings, key.seed
        self.device = torch.device(settings.device)
        self.model = fresh_model(task, key.seed).to(self.device)
        self.optimizer = fresh_optimizer(task, key.optimizer, self.model)
        self.schedule = fresh_schedule(task, self.optimizer, steps_of(task, settings.epochs))
        self.arm = CheckedArm(key.arm, self.model, self.optimizer)
        self.amp_dtype = amp_dtype(self.device) if settings.amp else None
        # Gradients in float16 underflow without loss scaling. A disabled scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train, and yield the numbers of each epoch."""
        # Dropout must not depend on how many random numbers the initialization of the model drew.
        seed_everything(derive(self.seed, "training"))
        for epoch, order in enumerate(islice(orders_of(self.task, self.seed), self.settings.epochs), start=1):
            numbers = self._train_on(order)
            numbers |= {f"test_{name}": value for name, value in self._evaluate(self.task.test).items()}
            if epoch == self.settings.epochs and _is_finite(numbers):
                # Use as many training as test examples, shuffled, since the first ones could be of a single class.
                train, test = self.task.train, self.task.test
                generator = torch.Generator("cpu").manual_seed(derive(self.seed, "gap"))
                shuffled = torch.randperm(len(train), generator=generator, device="cpu")  # type: ignore[arg-type]
                chosen = sorted(shuffled[: len(test)].tolist())  # type: ignore[arg-type]
                numbers["train_metric"] = self._evaluate(train, chosen)["metric"]
            yield numbers

    def _train_on(self, order: list[int]) -> dict[str, Any]:
        self.model.train()
        losses: list[Tensor] = []
        effects: list[Effect] = []
        batches = loader_of(self.task, order)
        for step, batch in enumerate(batches, start=1):
            if step == 1:
                data = digest([order, batch])
            losses.append(self._step(to_device(batch, self.device), effects if step in (1, len(batches)) else None))
        loss = _mean(map(float, losses), len(order), self.task.batch_size)
        share, norm, centered_norm, *_ = map(fmean, zip(*effects, strict=True)) if effects else [None] * 3
        numbers = {"train_loss": loss, "share": share, "gradient_norm": norm, "centered_norm": centered_norm}
        return numbers | {"drift": self.arm.drift.total(), "data": data}

    def _evaluate(self, dataset: Any, indices: Sequence[int] | None = None) -> dict[str, float]:
        """Return the mean loss and metric per example in eval mode; the metric is NaN if a loss is not finite."""
        self.model.eval()
        size = 4 * self.task.batch_size
        losses, metrics = [], []
        with torch.inference_mode():
            for batch in _Loader(dataset, size, sampler=indices, generator=torch.Generator("cpu")):
                loss, output, target = self._forward(to_device(batch, self.device))
                if not math.isfinite(loss):
                    return {"loss": float(loss), "metric": math.nan}
                losses.append(float(loss))
                metrics.append(float(self.task.metric(output, target)))
        count = len(dataset if indices is None else indices)
        return {"loss": _mean(losses, count, size), "metric": _mean(metrics, count, size)}

    def _step(self, batch: Any, effects: list[Effect] | None) -> Tensor:
        """Train on one batch, and check the arm if there are ``effects`` to add to; return the loss."""
        loss, *_ = self._forward(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if effects is not None and math.isfinite((effect := self.arm.watch()).norm):
            effects.append(effect)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if effects is not None:
            self.arm.verify()
        if self.schedule is not None:
            self.schedule.step()
        return loss.detach()

    def _forward(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Return the loss, the model's output and the target."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            output, target = _predict(self.model, batch)
            return self.task.loss(output, target), output, target


def amp_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of mixed precision: bfloat16 if the device supports it, otherwise float16."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Split a batch into input and target; raise a `TaskError` if it is not a pair."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        found = f"{len(batch)} values" if isinstance(batch, (list, tuple)) else f"a {type(batch).__name__}"
        raise TaskError(f"train and test: an example must be a pair (input, target) or a mapping, not {found}")
    return batch[0], batch[1]


def _predict(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return the model's output for a batch, and the target."""
    if isinstance(batch, Mapping):
        return model(**batch), batch
    inputs, target = pair_of(batch)
    return model(inputs), target


def _checked(reported: Any, epoch: int) -> dict[str, float]:
    if not isinstance(reported, Mapping):
        raise TaskError(f"run: epoch {epoch} is of type {type(reported).__name__}; report a mapping such as a dict")
    for name in sorted({"train_loss", "test_metric"} - reported.keys()):
        raise TaskError(f"run: epoch {epoch} lacks {name!r}; it has {', '.join(map(repr, reported)) or 'nothing'}")
    try:
        return {str(name): float(value) for name, value in reported.items()}
    except (TypeError, ValueError) as error:
        raise TaskError(f"run: epoch {epoch} holds a value that is not a number ({error})") from error


def _is_finite(numbers: Mapping[str, Any]) -> bool:
    return all(math.isfinite(numbers[name]) for name in ("train_loss", "test_loss", "test_metric") if name in numbers)


def _mean(values: Iterable[float], examples: int, batch_size: int) -> float:
    """Return the mean over the examples of values that are means over batches; the last batch may be smaller."""
    starts = range(0, examples, batch_size)
    return sum(x * min(batch_size, examples - start) for x, start in zip(values, starts, strict=True)) / examples


def _environment(settings: Settings | None) -> dict[str, str]:
    versions = {"gradcentral": metadata.version("gradcentral"), "torch": torch.__version__}
    versions["python"] = platform.python_version()
    if settings is None:
        return versions
    device = torch.device(settings.device)
    return versions | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else settings.device}
