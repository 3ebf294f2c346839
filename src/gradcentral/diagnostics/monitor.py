"""See what Gradient Centralization does while a model trains."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradcentral.attach import HookedCall, centering_of, closure_of, hooked_optimizer, replace_closure
from gradcentral.diagnostics.centering_effect import Effect, effects, norms, to_numbers, together
from gradcentral.diagnostics.monitor_plot import history
from gradcentral.diagnostics.record import Memory, Reading, Record
from gradcentral.diagnostics.writers import RecordFile, TensorBoard, read_records, sinks
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.plotting import LIGHT, Theme
from gradcentral.projection import unit_means
from gradcentral.weight_vectors import WeightVectors

__all__ = ["EVERY", "Monitor"]

EVERY = 200
"""The default interval: with it, monitoring takes less than 1 % of the time of even a small network's training.

Measured in processor time on one thread: 0.6 % of three linear layers of at most 32 (batch 20, 0.8 ms an iteration),
0.2 % of the digits CNN (batch 32, 3 ms), 0.05 % of ResNet-18 (32×32, batch 16).
"""


class Monitor:
    """Records what Gradient Centralization does to a model while it trains, every so many steps.

    Works with `gradcentral.centralize`, attached before or after, with gradcentral's own optimizers, and with an
    optimizer without GC: then it records what GC would do. It sees the gradients as they are when ``step()`` is called
    (or as its closure leaves them, the first time it is called), before they are centered; those that
    `gradcentral.centralize_gradients` has centered already have a share of zero. Training is the same to the bit with
    it and without.

    Args:
        model: whose parameters are looked at, as far as they are in the optimizer.
        optimizer: any ``torch.optim.Optimizer`` with step hooks.
        every: steps from one record to the next; the first is at step 0. In between a step takes a microsecond more.
        to: where records go besides `records`: a path that ends in .jsonl or .csv, a folder for TensorBoard or a
            ``SummaryWriter``, a function of a `Record`, or a list of these. With several processes give it in one of
            them. A file that holds records already is appended to by a training that goes on, that is after
            `load_state_dict` or with ``step``; any other must not be mixed with them, and its first step raises.
        layout: the weight vectors to look at; by default those of the GC that is attached, and ``weight_layout(model)``
            where none is.
        step: how many steps were taken before, 0 for a new training; `load_state_dict` sets it, too. Of a file's
            records those before it stand when it is read.

    A record is a `Record`: for each centered parameter, and for the whole net, share, norm and largest entry of the
    gradient before and after centering, drift of eᵀw since the monitor was attached, and sensitivity 1ᵀw. Drift and
    sensitivity are those of the weights that the gradient belongs to, before the step. With a GradScaler the numbers
    are those of the unscaled gradient; those that are not finite are None.

    A line of JSON takes about 240 bytes for each centered parameter, 13 kB for ResNet-50. While a record is made, a few
    copies of one gradient are in memory.

    Raises:
        TypeError: model, optimizer, layout or ``to`` is of another type.
        ValueError: ``every`` or ``step`` is out of range; none of the model's parameters is in the optimizer, or
            nothing of it is centered; a parameter is sharded; ``to`` has an unknown suffix or other contents. At the
            first step: ``to`` holds the records of another training.
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
        step: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: Monitor(model, optimizer)")
        if layout is not None and not isinstance(layout, WeightLayout):
            raise TypeError(f"layout must be a WeightLayout (weight_layout(model)), not {type(layout).__name__}")
        self._every = _whole_number("every", every, at_least=1)
        self._layout = layout
        self._model_layout = weight_layout(model)
        self._parameters = 0
        self._start: dict[Tensor, tuple[WeightVectors, Tensor]] = {}
        self._loaded: dict[str, Tensor] = {}
        self._memory = Memory()
        optimizer = hooked_optimizer(optimizer)
        self._check(optimizer)
        self._sinks = sinks(to)
        self._step = 0 if step is None else _whole_number("step", step, at_least=0)
        self._may_append = step is not None
        # A compiled training step would be compiled anew for each number of steps.
        hook = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._hook: Any = optimizer.register_step_pre_hook(hook)
        # Before centralize's hook, wherever that was attached or will be.
        optimizer._optimizer_step_pre_hooks.move_to_end(self._hook.id, last=False)  # type: ignore[attr-defined]

    @property
    def records(self) -> list[Record]:
        """The records of this run in memory, oldest first: a thousand at most, evenly spread, the newest always.

        Files have them all (see `read`).
        """
        return list(self._memory.records)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self._step

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Record]:
        """The records in a file that a monitor wrote: see `gradcentral.diagnostics.writers.read_records`."""
        return read_records(path)

    def plot(self, theme: Theme = LIGHT) -> Any:
        """The records in memory as a ``matplotlib.figure.Figure``: see `gradcentral.diagnostics.monitor_plot.history`.

        Raises:
            ValueError: there is no record yet.
            MissingExtraError: matplotlib is not installed.
        """
        return history(self.records, theme)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of steps, and where drift is counted from (a number a weight vector)."""
        names = self._model_layout.names
        start = {names[parameter]: means for parameter, (_, means) in self._start.items() if parameter in names}
        return {"step": self._step, "start": {**self._loaded, **start}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: steps and drift are counted from where they were.

        Records of later steps are forgotten: in memory, and in a file when it is read.

        Raises:
            ValueError: a parameter in it is not the model's, or has another number of weight vectors (at the next
                record).
        """
        unknown = set(state["start"]) - set(self._model_layout.names.values())
        if unknown:
            raise ValueError(f"state: {sorted(unknown)[0]} is no parameter of the model: load the state of its monitor")
        self._step = state["step"]
        self._may_append = True
        self._memory.go_back(self._step)
        self._loaded = dict(state["start"])
        self._start.clear()

    def remove(self) -> None:
        """End it; the records stay. Calling it twice is harmless."""
        self._hook.remove()
        for sink in self._sinks:
            if isinstance(sink, TensorBoard):
                sink.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _check(self, optimizer: Optimizer) -> None:
        watched = self._watched(optimizer)
        if self._model_layout.pending:
            return
        if not watched:
            raise ValueError(
                "optimizer: none of the model's parameters is in it: give the model whose parameters it was made with "
                "(make the optimizer after moving, wrapping or sharding the model)"
            )
        if not any(part.vectors for part in watched):
            raise ValueError(
                "layout: nothing in this optimizer is centered, so that there is nothing to see "
                f"({(self._model_layout if self._layout is None else self._layout).summary()})"
            )
        for part in watched:
            if part.vectors is not None:
                self._start_of(part, unit_means(part.parameter.detach(), part.vectors))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCall | None:
        if not self._may_append:
            self._check_files()
        step = self._step
        self._step += 1
        if step % self._every:
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            self._record(optimizer, step)
            return None
        return replace_closure(args, kwargs, self._recording(optimizer, step, closure))

    def _check_files(self) -> None:
        """Not before the first step: a state may be loaded until then."""
        for sink in self._sinks:
            if isinstance(sink, RecordFile) and sink.last is not None:
                raise ValueError(
                    f"to: {sink.path} has the records of a training, the last of step {sink.last.step}: give another "
                    "path; or go on with that training: load_state_dict, or step=, how many steps it had taken (0 to "
                    "start it anew)"
                )
        self._may_append = True

    def _recording(self, optimizer: Optimizer, step: int, closure: Callable[[], Any]) -> Callable[[], Any]:
        # The gradients appear inside step(); its first call of the closure is at the weights that the step begins with.
        seen = False

        @functools.wraps(closure)
        def recording_closure() -> Any:
            nonlocal seen
            loss = closure()
            if not seen:
                seen = True
                self._record(optimizer, step)
            return loss

        return recording_closure

    def _record(self, optimizer: Optimizer, step: int) -> None:
        with torch.no_grad():
            record = self._measure(optimizer, step)
        self._memory.add(record)
        for sink in self._sinks:
            sink(record)

    def _measure(self, optimizer: Optimizer, step: int) -> Record:
        watched = self._watched(optimizer)
        centered = [part for part in watched if part.vectors is not None]
        pairs = [(part, gradient) for part in watched if (gradient := part.parameter.grad) is not None]
        scale = _number(getattr(optimizer, "grad_scale", None), default=1.0)
        found = [_unscaled(effect, scale) for effect in effects([(g, part.vectors) for part, g in pairs])]
        of_gradients = {part.name: _of_gradient(effect) for (part, _), effect in zip(pairs, found, strict=True)}
        of_weights = self._weights(centered)
        return Record(
            step,
            placement=_placement(optimizer, watched),
            skipped=_number(getattr(optimizer, "found_inf", None), default=0.0) != 0,
            net=Reading(**(_of_gradient(together(found)) if found else {}), **_together(of_weights)),
            layers={
                part.name: Reading(**of_gradients.get(part.name, {}), **weights.numbers())
                for part, weights in zip(centered, of_weights, strict=True)
            },
        )

    def _weights(self, centered: list[_Part]) -> list[_Weights]:
        """Drift and sensitivity of each parameter; numbers travel from the device to Python once."""
        moved, means = [], []
        for part in centered:
            assert part.vectors is not None
            means.append(unit_means(part.parameter, part.vectors))
            moved.append(means[-1] - self._start_of(part, means[-1]).to(means[-1]))
        sizes = zip(norms(moved), norms(moved, torch.inf), norms(means), norms(means, torch.inf), strict=True)
        numbers = iter(to_numbers([size for sizes_of_one in sizes for size in sizes_of_one]))
        return [
            _weights(part.parameter.numel() // mean.numel(), mean.numel(), *itertools.islice(numbers, 4))
            for part, mean in zip(centered, means, strict=True)
        ]

    def _start_of(self, part: _Part, means: Tensor) -> Tensor:
        """The means that drift is counted from: those of now where the weight vectors are new, or others."""
        assert part.vectors is not None
        known = self._start.get(part.parameter)
        if known is None or known[0] != part.vectors:
            loaded = self._loaded.pop(part.name, means)
            if loaded.shape != means.shape:
                raise ValueError(f"state: {part.name} has other weight vectors now: attach a new Monitor")
            known = self._start[part.parameter] = part.vectors, loaded
        return known[1]

    def _watched(self, optimizer: Optimizer) -> list[_Part]:
        """The model's parameters in the optimizer, and their weight vectors."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = self._model_layout
        if own.pending or len(parameters) != self._parameters:
            own.refresh()
            self._parameters = len(parameters)
        names = own.names
        model = [p for p in parameters if p in names and not is_lazy(p) and p.numel()]
        for p in model:
            if any(base.__name__ == "DTensor" for base in type(p).__mro__):
                raise ValueError(f"model: {names[p]} is sharded (a DTensor), which Monitor can't read yet")
        layouts = _layouts_in_use(optimizer, model) or [own] if self._layout is None else [self._layout]
        return [_Part(names[p], p, next((layout[p] for layout in layouts if p in layout), None)) for p in model]


class _Part(NamedTuple):
    """A parameter that is looked at; its weight vectors where it is centered."""

    name: str
    parameter: Tensor
    vectors: WeightVectors | None


class _Weights(NamedTuple):
    """What a `Reading` says of weights, and how many weight vectors they are."""

    units: int
    drift: float
    largest_drift: float
    sensitivity: float
    largest_sensitivity: float

    def numbers(self) -> dict[str, float]:
        """By their names in a `Reading`."""
        return {name: value for name, value in self._asdict().items() if name != "units"}


def _layouts_in_use(optimizer: Optimizer, parameters: list[Tensor]) -> list[WeightLayout]:
    """The layouts of the GC that is attached to the optimizer, as far as they know some of these parameters."""
    layouts = [targets.layout for targets in centering_of(optimizer)]
    for layout in layouts:
        if layout.pending or not all(layout.in_model(p) for p in parameters):
            layout.refresh()
    return [layout for layout in layouts if any(layout.in_model(p) for p in parameters)]


def _placement(optimizer: Optimizer, parts: list[_Part]) -> str | None:
    """Of the GC that acts on some of these parameters; several where they differ."""
    acting = [targets for targets in centering_of(optimizer) if not targets.paused]
    found = {targets.placement for targets in acting if any(part.parameter in targets.layout for part in parts)}
    return " and ".join(sorted(found)) or None


def _unscaled(effect: Effect, scale: float) -> Effect:
    """The effect on the gradient that a GradScaler has multiplied."""
    return Effect(effect.share, *(number / scale for number in effect[1:]))


def _of_gradient(effect: Effect) -> dict[str, float]:
    # With a number that is not finite in the gradient, what remains of the others means nothing.
    return effect._asdict() if math.isfinite(effect.norm) else {}


def _weights(fan_in: int, units: int, moved: float, most_moved: float, means: float, largest_mean: float) -> _Weights:
    """From norms of the means and of how far they have moved: eᵀw = √M mean(w), 1ᵀw = M mean(w)."""
    return _Weights(
        units,
        drift=math.sqrt(fan_in) * moved,
        largest_drift=math.sqrt(fan_in) * most_moved,
        sensitivity=fan_in * means / math.sqrt(units),
        largest_sensitivity=fan_in * largest_mean,
    )


def _together(weights: list[_Weights]) -> dict[str, float]:
    """The numbers of all parameters over all their units."""
    if not weights:
        return {}
    squares = sum(part.units * part.sensitivity**2 for part in weights)

    def largest(values: list[float]) -> float:
        return max(values) if all(map(math.isfinite, values)) else math.nan

    return {
        "drift": math.hypot(*(part.drift for part in weights)),
        "largest_drift": largest([part.largest_drift for part in weights]),
        "sensitivity": math.sqrt(squares / sum(part.units for part in weights)),
        "largest_sensitivity": largest([part.largest_sensitivity for part in weights]),
    }


def _number(value: Tensor | float | None, default: float) -> float:
    return default if value is None else float(value)


def _whole_number(name: str, value: int, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
    return value
