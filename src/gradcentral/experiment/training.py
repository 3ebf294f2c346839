"""One run: training with one optimizer, arm and seed, from fresh weights to the last epoch."""

from __future__ import annotations

import inspect
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradcentral.diagnostics.batches import predict, to_device
from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.experiment.arms import CheckedArm
from gradcentral.experiment.data import Batches, epochs_of, evaluation_batches, steps_of
from gradcentral.experiment.determinism import derive, digest, seed_everything
from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.evaluation import join, number, on_cpu
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.task import CustomTask, Task, is_loader
from gradcentral.extras import own_version

__all__ = [
    "Settings",
    "Trainer",
    "amp_dtype",
    "check_device",
    "fresh_model",
    "fresh_optimizer",
    "fresh_schedule",
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
    which has no ``settings``, the user is responsible for both. A loss that is not finite ends the run early;
    divergence is a result, not an error.
    """
    started = time.perf_counter()
    seed_everything(key.seed)
    if isinstance(task, Task):
        assert settings is not None
        trainer = Trainer(task, settings, key)
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


def fresh_model(task: Task, seed: int) -> nn.Module:
    """Build the model with a seed; lazy parameters are initialized from the first training batch."""
    seed_everything(seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model: the factory must return an nn.Module, not {type(model).__name__}")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        with torch.no_grad():
            _predict(model.eval(), next(iter(next(epochs_of(task, seed)))))
    return model.train()


def fresh_optimizer(task: Task, name: str, model: nn.Module) -> Optimizer:
    """Build the optimizer of that name for the model's trainable parameters."""
    optimizer = task.optimizers[name]([p for p in model.parameters() if p.requires_grad])
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TaskError(f"optimizers[{name!r}]: the factory must return a torch.optim.Optimizer, not {kind}")
    if "closure" in _required(optimizer.step):
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
    if required := _required(schedule.step):
        raise TaskError(
            f"schedule: the step of {type(schedule).__name__} requires {', '.join(required)}, but a Task steps "
            "once per batch without arguments; use another schedule, such as CosineAnnealingLR(optimizer, steps), or "
            "write the training loop yourself as a CustomTask"
        )
    return schedule


def _required(function: Callable[..., object]) -> list[str]:
    """Return the parameters without a default that a call must pass."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def check_device(device: str, amp: bool) -> None:
    """Raise a `TaskError` unless the device is available and, if requested, supports mixed precision."""
    try:
        float(torch.zeros((), device=device))  # tensors on the device meta have no values
    except Exception as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise TaskError(f"device: {device!r} is not available; choose from {available}") from error
    if amp and not torch.amp.autocast_mode.is_autocast_available(torch.device(device).type):
        raise TaskError(f"amp: torch does not support mixed precision on {device!r}; omit it")


class Trainer:
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
        epochs = islice(epochs_of(self.task, self.seed), self.settings.epochs)
        for epoch, batches in enumerate(epochs, start=1):
            numbers = self._train_on(batches)
            loss, metric = self.evaluate(evaluation_batches(self.task))
            numbers |= {"test_loss": loss, "test_metric": metric}
            if epoch == self.settings.epochs and _is_finite(numbers):
                numbers["train_metric"] = self.evaluate(*self._some_of_train())[1]
            yield numbers

    def _train_on(self, batches: Batches) -> dict[str, Any]:
        self.model.train()
        losses: list[Tensor] = []
        sizes: list[int] = []
        effects: list[Effect] = []
        for step, (size, batch) in enumerate(batches.sized(), start=1):
            if step == 1:
                data = digest([batches.order, batch])
            sizes.append(size)
            losses.append(self.step(batch, effects if step in (1, len(batches)) else None))
        share, norm, centered_norm, *_ = map(fmean, zip(*effects, strict=True)) if effects else [None] * 3
        numbers = {"train_loss": _mean([float(loss) for loss in losses], sizes), "share": share}
        numbers |= {"gradient_norm": norm, "centered_norm": centered_norm}
        return numbers | {"drift": self.arm.drift.total(), "data": data}

    def _some_of_train(self) -> tuple[Batches, int | None]:
        """Return as many training as test examples, shuffled, since the first ones could be of a single class."""
        train, test = self.task.train, evaluation_batches(self.task)
        if is_loader(train):
            return Batches(train, self.task.batch_size, seed=derive(self.seed, "gap")), len(test)
        generator = torch.Generator("cpu").manual_seed(derive(self.seed, "gap"))
        shuffled = torch.randperm(len(train), generator=generator, device="cpu")
        size = 4 * self.task.batch_size
        chosen = sorted(shuffled[: test.examples or len(test) * size].tolist())
        return Batches(train, size, order=chosen, collate=self.task.collate), None

    def evaluate(self, batches: Batches, limit: int | None = None) -> tuple[float, float]:
        """Return the mean loss and the metric in eval mode, on the first ``limit`` batches.

        The metric is NaN if a loss is not finite.
        """
        self.model.eval()
        losses: list[float] = []
        sizes: list[int] = []
        parts: list[tuple[Any, Any]] = []
        # Not inference_mode: a tensor that the model caches there could not be used in the next epoch's backward pass.
        with torch.no_grad():
            for size, batch in islice(batches.sized(), limit):
                loss, output, target = self.forward(batch)
                losses.append(number("loss", loss))
                sizes.append(size)
                if not math.isfinite(losses[-1]):
                    return losses[-1], math.nan
                if self.task.metric_per_batch:
                    parts.append((number("metric", self.task.metric(output, target)), None))
                else:
                    parts.append((on_cpu(output), on_cpu(target)))
            outputs, targets = zip(*parts, strict=True)
            if self.task.metric_per_batch:
                return _mean(losses, sizes), _mean(outputs, sizes)
            value = self.task.metric(join("output", outputs, sizes), join("target", targets, sizes))
            return _mean(losses, sizes), number("metric", value)

    def step(self, batch: Any, effects: list[Effect] | None) -> Tensor:
        """Train on one batch, and check the arm if there are ``effects`` to add to; return the loss."""
        loss, *_ = self.forward(batch)
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

    def forward(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Return the loss, the model's output and the target."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            output, target = _predict(self.model, to_device(batch, self.device))
            return _scalar(self.task.loss(output, target)), output, target


def amp_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of mixed precision: bfloat16 if the device supports it, otherwise float16."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16


def _predict(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return the model's output for a batch, and the target; see `gradcentral.diagnostics.batches.predict`."""
    if not isinstance(batch, Mapping) and not (isinstance(batch, (list, tuple)) and len(batch) > 1):
        found = f"{len(batch)} values" if isinstance(batch, (list, tuple)) else f"a {type(batch).__name__}"
        raise TaskError(
            f"train and test: a batch must be a tuple (input, …, target) or a mapping, not {found}; "
            "collate=lambda examples: ... can make one of any examples"
        )
    return predict(model, batch)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TaskError(f"loss: must return a scalar tensor, not {found}")
    return loss


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
    """Whether the losses are finite; a metric may be undefined, as ROC AUC is for a single class."""
    return all(math.isfinite(numbers[name]) for name in ("train_loss", "test_loss") if name in numbers)


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean over the examples of values that are means over batches of these sizes."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _environment(settings: Settings | None) -> dict[str, str]:
    versions = {"gradcentral": own_version(), "torch": torch.__version__}
    versions["python"] = platform.python_version()
    if settings is None:
        return versions
    device = torch.device(settings.device)
    return versions | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else settings.device}
