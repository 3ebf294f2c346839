"""What `Monitor` measures at one step: the gradients and the weights that the step starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradcentral.attach import centering_of
from gradcentral.diagnostics.centering_effect import Effect, combine_effects, effects, norms, to_numbers
from gradcentral.diagnostics.drift import Drift, precise_means
from gradcentral.diagnostics.record import NET, Reading, Record
from gradcentral.layout import WeightLayout
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Watched", "measure", "watched_parameters"]


class Watched(NamedTuple):
    """A parameter that is monitored; ``vectors`` is None if it is not centered."""

    name: str
    parameter: Tensor
    vectors: WeightVectors | None


def watched_parameters(
    optimizer: Optimizer, model_layout: WeightLayout, layout: WeightLayout | None = None
) -> list[Watched]:
    """Return the parameters of the model that are in the optimizer, as both are now.

    Their weight vectors are those of ``layout``, else of the attached GC, else of ``model_layout``.

    Raises:
        ValueError: a parameter is sharded.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    _refresh(model_layout, held)
    names = model_layout.names
    parameters = [p for p in held if p in names and not is_lazy(p) and p.numel()]
    for p in parameters:
        if any(base.__name__ == "DTensor" for base in type(p).__mro__):
            raise ValueError(f"model: {names[p]} is sharded (a DTensor), which Monitor does not support")
    layouts = [layout] if layout is not None else _attached_layouts(optimizer, parameters) or [model_layout]
    return [Watched(names[p], p, next((found[p] for found in layouts if p in found), None)) for p in parameters]


def measure(optimizer: Optimizer, watched: Sequence[Watched], drift: Drift, step: int) -> Record:
    """Measure gradients and weights before a step of the optimizer.

    Raises:
        ValueError: the drift has a loaded reference for other weight vectors.
    """
    gradients = _gradient_readings(watched, _scalar(optimizer, "grad_scale", default=1.0))
    weights = _weight_readings(watched, drift)
    readings = {
        name: Reading(**gradients.get(name, {}), **weights.get(name, {}))
        for name in (NET, *(part.name for part in watched if part.vectors is not None))
    }
    return Record(
        step,
        placement=_placement(optimizer, watched),
        skipped=_scalar(optimizer, "found_inf", default=0.0) != 0,
        net=readings.pop(NET),
        layers=readings,
    )


def _gradient_readings(watched: Sequence[Watched], scale: float) -> dict[str, dict[str, float]]:
    pairs = [(part, gradient) for part in watched if (gradient := part.parameter.grad) is not None]
    found = [
        Effect(effect.share, *(number / scale for number in effect[1:]))
        for effect in effects([(gradient, part.vectors) for part, gradient in pairs])
    ]
    named = {part.name: effect for (part, _), effect in zip(pairs, found, strict=True)}
    if found:
        named[NET] = combine_effects(found)
    # A maximum over entries that include NaN is meaningless, so all five numbers are dropped together.
    return {name: effect._asdict() for name, effect in named.items() if math.isfinite(effect.norm)}


def _weight_readings(watched: Sequence[Watched], drift: Drift) -> dict[str, dict[str, float]]:
    """Measure drift and sensitivity of each centered parameter, and of all their weight vectors together."""
    drifts: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for name, parameter, vectors in watched:
        if vectors is None:
            continue
        means = precise_means(parameter, vectors)
        try:
            drifts[name] = drift.of(parameter, vectors, means)
        except ValueError as error:
            raise ValueError(f"state: {name} has other weight vectors now ({error}); attach a new Monitor") from error
        sums[name] = vectors.fan_in * means
    if not drifts:
        return {}
    drifts[NET], sums[NET] = _concatenated(drifts), _concatenated(sums)
    scalars = [norms(list(values.values()), order) for values in (drifts, sums) for order in (2.0, torch.inf)]
    numbers = to_numbers([scalar for group in scalars for scalar in group])
    groups = (numbers[start :: len(drifts)] for start in range(len(drifts)))
    return {
        name: {
            "drift": total,
            "largest_drift": largest,
            "sensitivity": total_sum / math.sqrt(sums[name].numel()),
            "largest_sensitivity": largest_sum,
        }
        for name, (total, largest, total_sum, largest_sum) in zip(drifts, groups, strict=True)
    }


def _concatenated(values: dict[str, Tensor]) -> Tensor:
    first = next(iter(values.values()))
    return torch.cat([value.to(first.device) for value in values.values()])


def _attached_layouts(optimizer: Optimizer, parameters: list[Tensor]) -> list[WeightLayout]:
    """Return the layouts of the GC attached to the optimizer that contain some of these parameters."""
    layouts = [targets.layout for targets in centering_of(optimizer)]
    for layout in layouts:
        _refresh(layout, parameters)
    return [layout for layout in layouts if any(layout.in_model(p) for p in parameters)]


def _refresh(layout: WeightLayout, parameters: list[Tensor]) -> None:
    if layout.pending or not all(layout.in_model(p) for p in parameters):
        layout.refresh()


def _placement(optimizer: Optimizer, watched: Sequence[Watched]) -> str | None:
    """Return the placement of the GC that acts on these parameters, or several joined by "and"."""
    active = [targets for targets in centering_of(optimizer) if not targets.paused]
    placements = {targets.placement for targets in active if any(part.parameter in targets.layout for part in watched)}
    return " and ".join(sorted(placements)) or None


def _scalar(optimizer: Optimizer, name: str, default: float) -> float:
    """Read a number that GradScaler sets on fused optimizers during their step."""
    value = getattr(optimizer, name, None)
    return default if value is None else float(value)
