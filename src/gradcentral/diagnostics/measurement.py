"""Measurements of `Monitor` at one step: the gradients and the weights that the step starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
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
from gradcentral.local_shard import gathered, is_on_this_rank, is_sharded
from gradcentral.weight_vectors import WeightVectors

__all__ = ["Watched", "measure", "watched_parameters"]


_WEIGHT_READINGS = ("drift", "sensitivity", "largest_drift", "largest_sensitivity")


class Watched(NamedTuple):
    """A parameter that is monitored; ``vectors`` is None if it is not centered."""

    name: str
    parameter: Tensor
    vectors: WeightVectors | None


def watched_parameters(optimizer: Optimizer, model_layout: WeightLayout, layout: WeightLayout | None) -> list[Watched]:
    """Return the parameters that are currently in both the model and the optimizer.

    Their weight vectors are those of ``layout``, otherwise of the attached GC, otherwise of ``model_layout``.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = _refreshed(model_layout, held).names
    parameters = [p for p in held if p in names and not is_lazy(p) and p.numel() and is_on_this_rank(p)]
    attached = [_refreshed(targets.layout, parameters) for targets in centering_of(optimizer)]
    attached = [one for one in attached if any(map(one.in_model, parameters))]
    layouts = attached or [model_layout] if layout is None else [layout]
    excluded = {p for targets in centering_of(optimizer) if layout is None for p in targets.excluded}
    vectors = {p: found[p] for found in reversed(layouts) for p in parameters if p in found and p not in excluded}
    return [Watched(names[p], p, vectors.get(p)) for p in parameters]


def _refreshed(layout: WeightLayout, parameters: list[Tensor]) -> WeightLayout:
    layout.follow()
    if layout.pending or not all(map(layout.in_model, parameters)):
        layout.refresh()
    return layout


def measure(
    optimizer: Optimizer, watched: Sequence[Watched], drift: Drift, step: int, name: str | None = None
) -> Record:
    """Measure gradients and weights before a step of the optimizer."""
    # GradScaler sets these attributes on fused optimizers during their step.
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    gradients = _gradient_readings(watched, 1.0 if scale is None else float(scale))
    weights = _weight_readings(watched, drift)
    readings = {
        name: Reading(**gradients.get(name, {}), **weights.get(name, {}))
        for name in (NET, *(part.name for part in watched if part.vectors is not None))
    }
    active = [targets for targets in centering_of(optimizer) if not targets.paused]
    placements = {targets.placement for targets in active if any(part.parameter in targets.layout for part in watched)}
    skipped = found_inf is not None and bool(found_inf)
    return Record(step, " and ".join(sorted(placements)) or None, skipped, readings.pop(NET), readings, name)


def _gradient_readings(watched: Sequence[Watched], scale: float) -> dict[str, dict[str, float]]:
    reached = [(part, g) for part in watched if (g := _gradient_or_zeros(part.parameter)) is not None]
    # The generator gathers one sharded gradient at a time.
    scaled = effects((gathered(gradient), part.vectors) for part, gradient in reached)
    found = {
        part.name: Effect(effect.share, *(number / scale for number in effect[1:]))
        for (part, _), effect in zip(reached, scaled, strict=True)
        if part.parameter.grad is not None or effect.norm > 0
    }
    if found:
        found[NET] = combine_effects([*found.values()])
    # A maximum over entries that include NaN is meaningless, so all five numbers are dropped together.
    return {name: effect._asdict() for name, effect in found.items() if math.isfinite(effect.norm)}


def _gradient_or_zeros(parameter: Tensor) -> Tensor | None:
    """Return the gradient; zeros for a sharded parameter without one, as other ranks may have one and gather it."""
    return torch.zeros_like(parameter) if parameter.grad is None and is_sharded(parameter) else parameter.grad


def _weight_readings(watched: Sequence[Watched], drift: Drift) -> dict[str, dict[str, float]]:
    """Measure drift and sensitivity of each centered parameter, and of all their weight vectors together."""
    measured: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter, vectors in watched:
        if vectors is None:
            continue
        means = precise_means(parameter, vectors)
        try:
            measured[name] = drift.of(parameter, vectors, means), vectors.fan_in * means
        except ValueError as error:
            raise ValueError(f"state: {name} has different weight vectors ({error}); attach a new Monitor") from error
    if not measured:
        return {}
    kinds = zip(*measured.values(), strict=True)
    drifts, sums = (torch.cat([tensor.to(means.device) for tensor in kind]) for kind in kinds)
    measured[NET] = drifts, sums
    scalars = [norm for pair in measured.values() for order in (2.0, torch.inf) for norm in norms(pair, order)]
    numbers = iter(to_numbers(scalars))
    readings = {}
    for name, (_, sums) in measured.items():
        drift_norm, sum_norm, *largest = islice(numbers, 4)
        values = drift_norm, sum_norm / math.sqrt(sums.numel()), *largest
        readings[name] = dict(zip(_WEIGHT_READINGS, values, strict=True))
    return readings
