"""One run: one optimizer, one arm, one seed, from fresh weights to the last epoch."""

from __future__ import annotations

import inspect
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from gradcentral.diagnostics.batches import to_device
from gradcentral.diagnostics.centering_effect import Effect
from gradcentral.experiment.arms import CheckedArm
from gradcentral.experiment.digest import digest
from gradcentral.experiment.errors import TaskError
from gradcentral.experiment.randomness import derive, seed_everything
from gradcentral.experiment.store import Key, Run
from gradcentral.experiment.task import CustomTask, Task

__all__ = [
    "Settings",
    "amp_dtype",
    "check_device",
    "follow",
    "fresh_model",
    "fresh_optimizer",
    "fresh_schedule",
    "loader_of",
    "orders_of",
    "pair_of",
    "train",
]

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """How every run of a comparison is trained.

    Attributes:
        epochs: passes over the training examples.
        device: a torch device.
        amp: whether to train in mixed precision: bfloat16 where the device has it, else float16 with loss scaling.
    """

    epochs: int
    device: str = "cpu"
    amp: bool = False


def train(task: Task, key: Key, settings: Settings, on_epoch: Listener) -> Run:
    """Train once and record every epoch.

    Two runs of one seed get the same initial weights and the same batches in the same order, whatever their arm and
    optimizer. At the first and the last step of every epoch the arm is checked (see `CheckedArm`).

    Args:
        task: what to train.
        key: which optimizer, arm and seed.
        settings: how.
        on_epoch: called with each epoch's record.

    Returns:
        The `Run`. A loss or metric that is not finite ends it: it diverged, which is a result.

    Raises:
        ArmError: the run did not do what its arm says.
    """
    started = time.perf_counter()
    model = fresh_model(task, key.seed)
    weights = digest(model.state_dict())
    model.to(settings.device)
    optimizer = fresh_optimizer(task, key.optimizer, model)
    steps = settings.epochs * math.ceil(_length(task.train) / task.batch_size)
    schedule = fresh_schedule(task, optimizer, steps)
    arm = CheckedArm(key.arm, model, optimizer)
    trainer = _Trainer(task, settings, model, optimizer, schedule, arm)
    # The model's factory may draw a different amount of random numbers than last week's; dropout must not care.
    seed_everything(derive(key.seed, "training"))
    orders = orders_of(task, key.seed)
    epochs: list[dict[str, Any]] = []
    train_metric = diverged_at = None
    for epoch in range(1, settings.epochs + 1):
        record = {"epoch": epoch, **trainer.epoch(next(orders))}
        epochs.append(record)
        on_epoch(record)
        if not all(math.isfinite(record[name]) for name in ("train_loss", "test_loss", "test_metric")):
            diverged_at = epoch
            break
    else:
        # As many as there are to test with, the same for all arms; the first ones could be of one class.
        some = torch.randperm(_length(task.train), generator=torch.Generator().manual_seed(derive(key.seed, "gap")))
        few = sorted(some[: _length(task.test)].tolist())
        train_metric = trainer.evaluate(task.train, few)["metric"]
    return Run(
        *key,
        epochs=epochs,
        train_metric=train_metric,
        diverged_at=diverged_at,
        seconds=time.perf_counter() - started,
        weights=weights,
        environment=_environment(settings),
    )


def follow(task: CustomTask, key: Key, on_epoch: Listener) -> Run:
    """Let a user's own trainer run, and check and record what it reports.

    Raises:
        TaskError: a report is not a mapping of numbers with ``train_loss`` and ``test_metric``, or there is none.
    """
    started = time.perf_counter()
    seed_everything(key.seed)
    epochs: list[dict[str, Any]] = []
    diverged_at = None
    for epoch, reported in enumerate(task.run(key.seed, key.arm), start=1):
        record = {"epoch": epoch, **_checked(reported, epoch)}
        epochs.append(record)
        on_epoch(record)
        if not all(math.isfinite(value) for value in record.values()):
            diverged_at = epoch
            break
    if not epochs:
        raise TaskError("run: reported no epoch; return or yield one mapping an epoch")
    return Run(
        *key,
        epochs=epochs,
        train_metric=None if diverged_at else epochs[-1].get("train_metric"),
        diverged_at=diverged_at,
        seconds=time.perf_counter() - started,
        weights=None,
        environment=_environment(None),
    )


def fresh_model(task: Task, seed: int) -> nn.Module:
    """The model as its factory makes it under a seed, lazy parameters given their values."""
    seed_everything(seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model: the factory must return an nn.Module, not {type(model).__name__}")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        inputs, _ = pair_of(next(iter(DataLoader(task.train, task.batch_size))))
        with torch.no_grad():
            model.eval()(inputs)
    return model.train()


def orders_of(task: Task, seed: int) -> Iterator[list[int]]:
    """The order of the training examples in each epoch of a run, without end."""
    generator = torch.Generator().manual_seed(derive(seed, "order"))
    while True:
        yield torch.randperm(_length(task.train), generator=generator).tolist()


def loader_of(task: Task, order: list[int]) -> DataLoader[Any]:
    """The batches of one epoch; that they are loaded draws no random number from anybody."""
    return DataLoader(task.train, task.batch_size, sampler=order, generator=torch.Generator())


def fresh_optimizer(task: Task, name: str, model: nn.Module) -> Optimizer:
    """The optimizer of that name over the model's trainable parameters."""
    optimizer = task.optimizers[name]([p for p in model.parameters() if p.requires_grad])
    if not isinstance(optimizer, Optimizer):
        raise TaskError(
            f"optimizers[{name!r}]: the factory must return a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TaskError(
            f"optimizers[{name!r}]: {type(optimizer).__name__} needs a closure for its step, which this trainer does "
            "not give; compare it with a trainer of your own (CustomTask)"
        )
    return optimizer


def fresh_schedule(task: Task, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The schedule over so many steps, where the task has one."""
    if task.schedule is None:
        return None
    schedule = task.schedule(optimizer, steps)
    if not isinstance(schedule, LRScheduler):
        raise TaskError(f"schedule: must return a torch LRScheduler, not {type(schedule).__name__}")
    return schedule


def check_device(device: str, amp: bool) -> None:
    """Refuse a device that is not there, or that has no mixed precision.

    Raises:
        TaskError: naming the parameter and what there is.
    """
    try:
        torch.empty(1, device=device).add_(1)
    except Exception as error:
        there = ["cpu"]
        if (accelerator := torch.accelerator.current_accelerator()) is not None and torch.accelerator.is_available():
            there.append(accelerator.type)
        raise TaskError(f"device: {device!r} can't be used here; there is {' and '.join(there)}") from error
    if amp and not torch.amp.autocast_mode.is_autocast_available(torch.device(device).type):
        raise TaskError(f"amp: torch has no mixed precision on {device!r}; leave it out")


class _Trainer:
    """The training loop of one run."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        arm: CheckedArm,
    ) -> None:
        self.task, self.model, self.optimizer, self.schedule, self.arm = task, model, optimizer, schedule, arm
        self.device = torch.device(settings.device)
        self.amp_dtype = amp_dtype(self.device) if settings.amp else None
        # Gradients in float16 underflow without a scale; with it disabled the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def epoch(self, order: list[int]) -> dict[str, Any]:
        """Train on the examples in this order, then test."""
        self.model.train()
        losses: list[tuple[Tensor, int]] = []
        seen: list[Effect] = []
        batches = loader_of(self.task, order)
        data = ""
        for step, batch in enumerate(batches, start=1):
            inputs, targets = pair_of(batch)
            if step == 1:
                data = digest([order, inputs, targets])
            loss = self._step(inputs, targets, seen if step in (1, len(batches)) else None)
            losses.append((loss, _count(targets)))
        tested = self.evaluate(self.task.test)
        return {
            "train_loss": sum(float(loss) * n for loss, n in losses) / sum(n for _, n in losses),
            "test_loss": tested["loss"],
            "test_metric": tested["metric"],
            "share": _mean(effect.share for effect in seen),
            "gradient_norm": _mean(effect.norm for effect in seen),
            "centered_norm": _mean(effect.centered_norm for effect in seen),
            "drift": self.arm.drift(),
            "data": data,
        }

    def _step(self, inputs: Any, targets: Any, seen: list[Effect] | None) -> Tensor:
        with self._autocast():
            loss = self._loss(self.model(to_device(inputs, self.device)), to_device(targets, self.device))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if seen is not None:
            self.arm.watch()
            effect = self.arm.effect()
            if math.isfinite(effect.norm):
                seen.append(effect)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if seen is not None:
            self.arm.verify()
        if self.schedule is not None:
            self.schedule.step()
        return loss.detach()

    def evaluate(self, dataset: Any, indices: Sequence[int] | None = None) -> dict[str, float]:
        """Mean loss and metric per example, in eval mode; a loss that is not finite ends it, metric NaN."""
        self.model.eval()
        losses = metrics = count = 0.0
        with torch.inference_mode():
            for batch in DataLoader(dataset, 4 * self.task.batch_size, sampler=indices, generator=torch.Generator()):
                inputs, targets = pair_of(batch)
                targets = to_device(targets, self.device)
                with self._autocast():
                    output = self.model(to_device(inputs, self.device))
                    loss = float(self._loss(output, targets))
                if not math.isfinite(loss):
                    return {"loss": loss, "metric": math.nan}
                n = _count(targets)
                losses += loss * n
                metrics += float(self.task.metric(output, targets)) * n
                count += n
        return {"loss": losses / count, "metric": metrics / count}

    def _loss(self, output: Any, targets: Any) -> Tensor:
        loss = self.task.loss(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskError(f"loss: must return a scalar tensor, the mean over the batch, not {found}")
        return loss

    def _autocast(self) -> Any:
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, dtype=self.amp_dtype)


def amp_dtype(device: torch.device) -> torch.dtype:
    """What mixed precision computes in: bfloat16 where the device has it."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16


def _checked(reported: Any, epoch: int) -> dict[str, float]:
    if not isinstance(reported, Mapping):
        raise TaskError(f"run: epoch {epoch} is a {type(reported).__name__}; report a mapping such as a dict")
    for name in ("train_loss", "test_metric"):
        if name not in reported:
            raise TaskError(f"run: epoch {epoch} lacks {name!r}; it has {', '.join(map(repr, reported)) or 'nothing'}")
    try:
        return {str(name): float(value) for name, value in reported.items()}
    except (TypeError, ValueError) as error:
        raise TaskError(f"run: epoch {epoch} holds something that is no number ({error})") from error


def pair_of(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and targets.

    Raises:
        TaskError: it is not a pair.
    """
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        found = f"{len(batch)} things" if isinstance(batch, (list, tuple)) else f"a {type(batch).__name__}"
        raise TaskError(f"train and test: an example must be a pair (input, target), not {found}")
    return batch[0], batch[1]


def _count(targets: Any) -> int:
    """Examples in a batch."""
    while not isinstance(targets, Tensor):
        targets = next(iter(targets.values())) if isinstance(targets, Mapping) else targets[0]
    return len(targets)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def _length(dataset: Any) -> int:
    return len(dataset)


def _environment(settings: Settings | None) -> dict[str, str]:
    found = {"gradcentral": metadata.version("gradcentral"), "torch": torch.__version__}
    found["python"] = platform.python_version()
    if settings is not None:
        device = torch.device(settings.device)
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else settings.device
    return found
