"""`Monitor`: record the effect of Gradient Centralization while a model trains."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradcentral.diagnostics.drift import Drift
from gradcentral.diagnostics.measurement import measure, watched_parameters
from gradcentral.diagnostics.record import Record, plot_records
from gradcentral.diagnostics.record_files import read_records
from gradcentral.diagnostics.writers import writers_for
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.local_shard import any_sharded
from gradcentral.plotting import LIGHT, Theme
from gradcentral.step_hooks import HookedCall, closure_of, hooked_optimizer, replace_closure

__all__ = ["EVERY", "Monitor", "RecordBuffer"]

EVERY = 200
"""Default number of steps per record, which costs less than 1 % of the training time of a small network.

On one thread: 0.6 % for three linear layers of at most 32 units, 0.2 % for the digits CNN, 0.05 % for ResNet-18.
"""


class Monitor(AbstractContextManager["Monitor"]):
    """Record the effect of Gradient Centralization on a model, every few steps of its training.

    It works with `gradcentral.centralize`, attached before or after the monitor, with gradcentral's own optimizers, and
    with an optimizer without GC, for which it records what GC would do. It reads the gradients that ``step()`` receives
    (with a closure, after its first call), before they are centered; gradients that
    `gradcentral.centralize_gradients` has centered have a share of zero. Training is bit-identical with and without it.

    Args:
        model: its parameters are monitored if they are in the optimizer.
        optimizer: any ``torch.optim.Optimizer`` with step hooks.
        every: steps per record; the first record is at step 0. Other steps cost about 1 µs.
        to: destination of the records besides `records`: a path ending in .jsonl or .csv, a folder for TensorBoard or a
            ``SummaryWriter``, a logger, a function, or a list of these. A logger is anything with ``log_metrics`` or
            ``log`` that takes a dictionary and ``step=``, such as a Weights & Biases run or a logger of Lightning; it
            receives ``record.scalars()``. So does a function with a parameter ``step``, such as ``wandb.log`` (after
            ``wandb.init``) and ``mlflow.log_metrics``; any other function receives the `Record`. With several
            processes, give it in one of them. An existing file of records is appended to only if the run continues,
            that is, after `load_state_dict` or with ``step``; otherwise the first step raises an error. An exception
            while writing is one warning: the training goes on, and later records are written if possible.
        layout: weight vectors to monitor; by default those of the attached GC, or ``weight_layout(model)`` without GC.
        name: tells several monitors apart that share a destination, as in a GAN: the attribute ``name`` of a `Record`,
            and the start of its scalars' tags. Without names, each needs its own destination.
        step: number of steps taken before, 0 for a new run; `load_state_dict` sets it too. When a file is read, new
            records replace those from this step on. The attribute ``step`` counts the steps taken.

    A record is a `Record`: for each centered parameter and for the whole net, share, norm and largest entry of the
    gradient before and after centering, the drift of eᵀw since the monitor was attached, and the sensitivity 1ᵀw.
    Drift and sensitivity are measured on the weights before the step, at which the gradient was computed. With a
    GradScaler, values refer to the unscaled gradient; values that are not finite are None. A line of JSON takes about
    240 bytes per centered parameter, 13 kB for ResNet-50. A record needs memory for a few copies of the largest
    parameter. A copy of a monitor (``copy.deepcopy``, pickle) keeps its records and its state, but is not attached.

    If parameters are DTensors, every rank must create the monitor, with the same ``every``: a record gathers one
    parameter after another, and is the same on all ranks.

    Raises:
        TypeError: model, optimizer, layout or ``to`` is of the wrong type.
        ValueError: ``every`` or ``step`` is out of range; ``name`` is not one line of text; none of the model's
            parameters is in the optimizer, or none of them is centered; ``to`` has an unknown suffix or other contents;
            or, at the first step, it has the records of another run or receives those of another monitor.
        MissingExtraError: ``to`` is a folder, and TensorBoard is not installed.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = gradcentral.centralize(optimizer, model)
        >>> with gradcentral.Monitor(model, optimizer, every=10) as monitor:
        ...     for _ in range(30):
        ...         optimizer.zero_grad()
        ...         model(torch.rand(8, 4)).square().sum().backward()
        ...         optimizer.step()
        >>> [record.step for record in monitor.records]
        [0, 10, 20]
        >>> monitor.records[-1].layers["weight"].share > 0.5
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = EVERY,
        to: Any = None,
        layout: WeightLayout | None = None,
        name: str | None = None,
        step: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, not {type(model).__name__}; use Monitor(model, optimizer)"
            )
        if layout is not None and not isinstance(layout, WeightLayout):
            raise TypeError(f"layout must be a WeightLayout, not {type(layout).__name__}; use weight_layout(model)")
        if name is not None and not (isinstance(name, str) and name and name.isprintable()):
            raise ValueError(f"name must be one line of text, such as 'generator', not {name!r}")
        self.name = name
        self._every = _checked_integer("every", every, at_least=1)
        self._layout = layout
        self._model_layout = weight_layout(model)
        self._drift = Drift()
        self._buffer = RecordBuffer(every=self._every)
        optimizer = hooked_optimizer(optimizer)
        self._set_references(optimizer)
        self.step = 0 if step is None else _checked_integer("step", step, at_least=0)
        self._may_append, self._started = step is not None, False
        self._writers = writers_for(to, name)
        self._may_nest = _may_nest(type(optimizer))
        self._running: int | None = None
        self._calls_closure = False
        self._unwritten: Record | None = None
        self._warned = False
        # Dynamo would recompile a compiled training step whenever self.step changes.
        hook = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._hooks: list[Any] = [optimizer.register_step_pre_hook(hook)]
        if self._may_nest:
            self._register_after_step(optimizer)
        # The hook must run before that of centralize, which may be attached before or after it.
        optimizer._optimizer_step_pre_hooks.move_to_end(self._hooks[0].id, last=False)  # type: ignore[attr-defined]

    @property
    def records(self) -> list[Record]:
        """The records in memory, oldest first. At most 1000, evenly spaced, plus the newest; files contain all."""
        return list(self._buffer.records)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Record]:
        """Read a file that a monitor wrote: see `gradcentral.diagnostics.read_records`."""
        return read_records(path)

    def plot(self, theme: Theme = LIGHT) -> Any:
        """Draw the records in memory: see `gradcentral.diagnostics.plot_records`."""
        return plot_records(self.records, theme)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the number of steps, and one number per weight vector for the drift."""
        return {"step": self.step, "start": self._drift.state_dict(self._model_layout.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; later records are dropped from memory, and from a file when it is read.

        Raises:
            ValueError: a parameter in the state is not in the model, or, at the next record, has another number of
                weight vectors.
        """
        names = self._model_layout.names
        if unknown := sorted(set(state["start"]) - set(names.values())):
            raise ValueError(
                f"state: {unknown[0]} is not a parameter of the model; load the state of a monitor of this model"
            )
        self.step = state["step"]
        self._may_append = True
        self._buffer.rewind(self.step)
        self._drift.load_state_dict(state["start"], names)

    def remove(self) -> None:
        """Detach the monitor and keep its records. Calling it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._close_writers()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _set_references(self, optimizer: Optimizer) -> None:
        watched = watched_parameters(optimizer, self._model_layout, self._layout)
        if self._model_layout.pending:
            return  # lazy parameters get their references at the first record
        if not watched:
            raise ValueError(
                "optimizer: contains none of the model's parameters; pass the model it was created for, and create it "
                "after moving, wrapping or sharding the model"
            )
        centered = [(part.parameter, part.vectors) for part in watched if part.vectors is not None]
        if not centered:
            layout = self._model_layout if self._layout is None else self._layout
            nothing = f"layout: nothing in this optimizer is centered ({layout.summary()})"
            raise ValueError(f"{nothing}\n{layout.to_paste()}".rstrip())
        self._drift = Drift(centered)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCall | None:
        if not self._started:
            self._start_writing()
        if self._may_nest and self._is_nested(_stack_depth()):
            return None
        step = self.step
        self.step += 1
        self._unwritten = None
        if step % self._every:
            return None
        closure = closure_of(args, kwargs)
        if not callable(closure):  # some optimizers take the loss as the first argument of step
            self._write(self._measure(optimizer, step))
            return None
        if not self._calls_closure:
            # Some optimizers accept a closure without calling it: then this record, of the gradients that exist before
            # the step, is the right one.
            self._unwritten = self._measure(optimizer, step)
            self._register_after_step(optimizer)
        unrecorded = [step]

        @functools.wraps(closure)
        def recording_closure() -> Any:
            loss = closure()
            self._calls_closure, self._unwritten = True, None
            if unrecorded:  # later calls, as in LBFGS, use other weights than those the step started from
                self._write(self._measure(optimizer, unrecorded.pop()))
            return loss

        return replace_closure(args, kwargs, recording_closure)

    def _is_nested(self, depth: int) -> bool:
        """Return whether this step is called by another step of the optimizer, which has run the hooks already.

        A step that raised an exception has no end, so the depth of the stack tells a nested step from the next one.
        """
        if self._running is not None and depth > self._running:
            return True
        self._running = depth
        return False

    def _register_after_step(self, optimizer: Optimizer) -> None:
        if len(self._hooks) == 1:
            hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
            self._hooks.append(optimizer.register_step_post_hook(hook))

    def _after_step(self, *_: object) -> None:
        if self._running is not None:
            if _stack_depth() > self._running:
                return
            self._running = None
        self._write(self._unwritten)
        self._unwritten = None

    def _start_writing(self) -> None:
        """Refuse to mix two runs in one destination; at the first step, because a state may be loaded until then."""
        try:
            for writer in self._writers:
                last = writer.start()
                if last is not None and not self._may_append:
                    raise ValueError(
                        f"to: {writer.where} has the records of a run, the last of step {last.step}; give another "
                        "path, or continue that run with load_state_dict or step= (the number of steps it had taken; "
                        "step=0 replaces its records)"
                    )
        except ValueError:
            self._close_writers()
            raise
        self._started = True

    def _close_writers(self) -> None:
        for writer in self._writers:
            writer.close()

    def _measure(self, optimizer: Optimizer, step: int) -> Record | None:
        try:
            with torch.no_grad():
                watched = watched_parameters(optimizer, self._model_layout, self._layout)
                return measure(optimizer, watched, self._drift, step, self.name)
        except RuntimeError as error:  # such as a lack of memory
            if any_sharded(p for group in optimizer.param_groups for p in group["params"]):
                raise  # the other ranks would wait for this one
            if not self._warned:
                self._warned = True
                reason = traceback.format_exception_only(error)[-1].strip()
                warnings.warn(f"Monitor: step {step} was not recorded ({reason}); training goes on", stacklevel=2)
            return None

    def _write(self, record: Record | None) -> None:
        if record is not None:
            self._buffer.add(record)
            for write in self._writers:
                write(record)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy, which is not attached and writes nowhere."""
        return {**vars(self), "_hooks": [], "_writers": [], "_unwritten": None}


class RecordBuffer:
    """At most ``limit`` records: the newest, and those at multiples of a spacing, which doubles as needed."""

    def __init__(self, limit: int = 1000, every: int = 1) -> None:
        self.records: list[Record] = []
        self._limit, self._every, self._spacing = limit, every, every

    def add(self, record: Record) -> None:
        if self.records and self.records[-1].step % self._spacing:
            self.records.pop()  # it was kept only as the newest
        while len(self.records) >= self._limit:
            self._spacing *= 2
            self.records = [kept for kept in self.records if kept.step % self._spacing == 0]
        self.records.append(record)

    def rewind(self, step: int) -> None:
        """Drop the records of this step and later ones, to continue from an earlier checkpoint."""
        self.records = [kept for kept in self.records if kept.step < step]
        self._spacing = self._spacing if self.records else self._every


def _may_nest(optimizer: type[Optimizer]) -> bool:
    """Return whether a class may call ``super().step()``, which runs the hooks of the step once more."""
    hooked = [cls for cls in optimizer.__mro__ if hasattr(vars(cls).get("step"), "hooked")]
    return len(hooked) > 1 and hooked[0].__module__.partition(".")[0] not in ("torch", "gradcentral")


def _stack_depth() -> int:
    """Return the number of frames below the caller."""
    frame, depth = sys._getframe(1), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _checked_integer(name: str, value: int, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
    return value
