"""`probe`: what Gradient Centralization would do to each layer of a model, measured on real batches before training."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradcentral.diagnostics.batches import loss_of, moved
from gradcentral.diagnostics.centering_effect import Effect, effects, together
from gradcentral.diagnostics.findings import Finding, finding_of_layer, finding_of_model
from gradcentral.diagnostics.input_means import InputMean, InputMeans
from gradcentral.diagnostics.preserve import unchanged
from gradcentral.layout import Entry, WeightLayout, weight_layout
from gradcentral.layout.table import aligned, compact_names
from gradcentral.weight_vectors import WeightVectors

__all__ = ["LayerReport", "ProbeReport", "probe"]

DEFAULT_BATCHES = 8


@dataclass(frozen=True)
class LayerReport:
    """What centering would do to one parameter.

    Attributes:
        name: the parameter's.
        vectors: its weight vectors; None where it is left alone.
        reason: why it is left alone; empty where it is centered.
        effects: one `Effect` for each batch that gave it a gradient.
        input: mean of the inputs of its layer, where they could be seen.
    """

    name: str
    vectors: WeightVectors | None
    reason: str
    effects: tuple[Effect, ...]
    input: InputMean | None

    @property
    def share(self) -> float:
        """Part of the gradient's energy that centering removes, mean over the batches; 0 where it is left alone."""
        return self.mean("share") if self.effects else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the share over the batches; 0 for one batch."""
        if math.isnan(self.share):
            return math.nan
        return statistics.stdev(e.share for e in self.effects) if len(self.effects) > 1 else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between g and Φ(g), mean over the batches; NaN without a gradient."""
        return self.mean("cosine")

    def mean(self, what: str) -> float:
        """Mean over the batches of a number that `Effect` has, such as ``"norm"``; NaN without a gradient."""
        values = [float(getattr(effect, what)) for effect in self.effects]
        return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan

    @property
    def finding(self) -> str:
        """In plain words: no-op, acts, near-erasure, or why it is left alone."""
        return self._finding.text

    @property
    def kind(self) -> str:
        """``"no-op"``, ``"acts"``, ``"near-erasure"``, ``"left alone"``, ``"no gradient"`` or ``"not finite"``."""
        return self._finding.kind

    @property
    def _finding(self) -> Finding:
        return finding_of_layer(self.vectors, self.reason, self.effects, self.share, self.input)


@dataclass(frozen=True)
class ProbeReport:
    """What `probe` found; ``print`` it for a table.

    Attributes:
        layers: one entry for each parameter of the model, centered or left alone.
        whole: one `Effect` for each batch: on the gradients of all parameters as one vector.
        losses: of the batches.
    """

    layers: tuple[LayerReport, ...]
    whole: tuple[Effect, ...]
    losses: tuple[float, ...]

    @property
    def share(self) -> float:
        """Part of the whole gradient's energy that centering removes, mean over the batches."""
        return math.fsum(effect.share for effect in self.whole) / len(self.whole)

    @property
    def centered(self) -> tuple[LayerReport, ...]:
        """Those that GC centers."""
        return tuple(layer for layer in self.layers if layer.vectors is not None)

    @property
    def finding(self) -> str:
        """In plain words, about the model."""
        return finding_of_model(self.share, [layer._finding for layer in self.centered])

    def __str__(self) -> str:
        """A table of the centered parameters, the others by reason, and the finding."""
        header = ("parameter", "share", "‖g‖", "‖Φ(g)‖", "max |g|", "max |Φ(g)|", "cos", "input mean", "finding")
        rows = [
            (
                layer.name,
                "–" if math.isnan(layer.share) else f"{layer.share:.1%} ± {layer.spread:.1%}",
                *(_number(layer.mean(what)) for what in ("norm", "centered_norm", "largest", "centered_largest")),
                "–" if math.isnan(layer.cosine) else f"{layer.cosine:.3f}",
                _number(layer.input.mean) if layer.input else "–",
                layer.finding,
            )
            for layer in self.centered
        ]
        parts = [aligned([header, *rows])] if rows else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.vectors is None:
                reasons.setdefault(layer.reason, []).append(layer.name)
        if reasons:
            lines = [f"  {reason}: {', '.join(compact_names(names))}" for reason, names in reasons.items()]
            parts.append("\n".join(["Left alone:", *lines]))
        return "\n\n".join([*parts, self.finding])

    __repr__ = __str__

    def to_csv(self) -> str:
        """One line for each parameter: means over the batches."""
        numbers = ("norm", "centered_norm", "largest", "centered_largest", "cosine")
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["parameter", "kind", "share", "share_spread", *numbers, "input_mean", "input_offset", "finding"]
        )
        for layer in self.layers:
            cells: list[Any] = [layer.name, layer.kind, layer.share, layer.spread, *map(layer.mean, numbers)]
            cells += [*(layer.input or (None, None)), layer.finding]
            writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells)
        return file.getvalue()

    def plot(self) -> Any:
        """The shares as a matplotlib ``Figure``; needs the ``experiments`` extra."""
        from gradcentral.diagnostics.probe_plot import shares
        from gradcentral.plotting import LIGHT

        return shares(self.centered, self.share, LIGHT)


def probe(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    layout: WeightLayout | None = None,
    max_batches: int = DEFAULT_BATCHES,
) -> ProbeReport:
    """Where would GC act? Its effect on each layer's gradient, over several batches, before any training.

    The mean of a weight vector's gradient is Σ δ·mean(x), so GC removes what the mean of a layer's input contributes:
    nothing after LayerNorm, nearly all after a sigmoid. The share says where GC acts, not whether it helps; for that
    there is `gradcentral.compare`.

    The model is left exactly as it was: weights, gradients, buffers, modes and random numbers, a ``DataLoader``'s own
    included. So is a loss that is a module; what else a loss function holds, such as another network, can't be seen.
    The model is run in training mode; parts that are in evaluation mode while it trains (frozen BatchNorm) stay so.

    Args:
        model: on any device; batches are moved there.
        loss: ``loss(output, target)`` -> scalar tensor.
        batches: ``(input, target)`` pairs, such as a ``DataLoader``; the model is called with the input. A mapping,
            as of tokenizers, is passed as ``model(**batch)`` and ``loss(output, batch)``.
        layout: instead of ``weight_layout(model)``.
        max_batches: how many batches to take at most.

    Returns:
        A `ProbeReport`: ``.layers`` with ``.name``, ``.share`` and ``.finding``; print it, or ``.plot()`` it.

    Raises:
        ValueError: there is no batch, or the loss is no scalar tensor, or reaches no parameter.
        TypeError: a batch is neither a pair nor a mapping.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> batch = torch.rand(32, 8), torch.rand(32, 2)
        >>> report = gradcentral.probe(model, torch.nn.functional.mse_loss, [batch])
        >>> report.layers[4].name, report.layers[4].finding
        ('2.weight', 'no-op: its input is centered already (as after LayerNorm)')
    """
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, not {max_batches}")
    layout = layout if layout is not None else weight_layout(model)
    entries = [entry for entry in layout.entries if entry.parameter.requires_grad]
    found: dict[str, list[Effect]] = {entry.name: [] for entry in layout.entries}
    whole, losses = [], []
    device = entries[0].parameter.device if entries else torch.device("cpu")
    with ExitStack() as put_back, torch.enable_grad():
        put_back.enter_context(_generators_unchanged(batches))
        put_back.enter_context(unchanged(model))
        if isinstance(loss, nn.Module):
            put_back.enter_context(unchanged(loss))
        inputs = put_back.enter_context(InputMeans(model, layout))
        if not model.training:
            model.train()
        for batch in itertools.islice(batches, max_batches):
            value = loss_of(model, loss, moved(batch, device))
            model.zero_grad(set_to_none=True)
            # Not autograd.grad, which in silence gives none for what lies behind a reentrant checkpoint.
            value.backward()  # type: ignore[no-untyped-call]
            reached = [(entry, g) for entry in entries if (g := entry.parameter.grad) is not None]
            if not reached:
                raise ValueError("loss: does not depend on the model's parameters; is it made from the output?")
            seen = effects([(gradient, entry.vectors) for entry, gradient in reached])
            for (entry, _), effect in zip(reached, seen, strict=True):
                found[entry.name].append(effect)
            whole.append(together(seen))
            losses.append(float(value.detach()))
        if not whole:
            raise ValueError("batches: there is no batch")
        layers = [_layer(entry, found[entry.name], inputs) for entry in layout.entries]
    return ProbeReport(tuple(layers), tuple(whole), tuple(losses))


def _layer(entry: Entry, seen: list[Effect], inputs: InputMeans) -> LayerReport:
    if not entry.parameter.requires_grad:
        return LayerReport(entry.name, None, "does not train", (), None)
    x = inputs.of(entry.parameter) if entry.vectors is not None else None
    return LayerReport(entry.name, entry.vectors, entry.reason, tuple(seen), x)


@contextmanager
def _generators_unchanged(batches: object) -> Iterator[None]:
    """Put a loader's own random generator back, so that training draws what it would have drawn."""
    holders = (batches, getattr(batches, "sampler", None))
    generators = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
