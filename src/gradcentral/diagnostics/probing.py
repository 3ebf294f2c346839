"""`probe`: measure where Gradient Centralization would act in a model, before training."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradcentral.diagnostics.advice import kinds_of
from gradcentral.diagnostics.batches import loss_of, to_device
from gradcentral.diagnostics.centering_effect import Effect, combine_effects, effects
from gradcentral.diagnostics.input_means import InputMeans
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.diagnostics.probe_report import LayerReport, ProbeReport
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.local_shard import is_sharded

__all__ = ["DEFAULT_BATCHES", "probe"]

DEFAULT_BATCHES = 8


def probe(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    layout: WeightLayout | None = None,
    max_batches: int = DEFAULT_BATCHES,
) -> ProbeReport:
    """Measure where GC would act: its effect on each layer's gradient, over several batches, before training.

    The mean of a weight vector's gradient is Σ δ·mean(x), so GC removes what the mean of a layer's input contributes:
    nothing after LayerNorm, nearly everything after a sigmoid. The share shows where GC acts, not whether it helps;
    `gradcentral.compare` measures that.

    The model is restored exactly, even after an exception: weights, gradients, buffers, modes, hooks, the attributes of
    its modules, and the random number generators, including that of a ``DataLoader``. A loss that is a module is
    restored too; other state of a loss function, such as another network, is not. The model runs in training mode; if
    it is already in training mode, submodules in evaluation mode (frozen BatchNorm) remain in it. ``torch.no_grad`` and
    ``torch.inference_mode`` around the call have no effect on it.

    Args:
        model: a model on any device; batches are moved to it.
        loss: ``loss(output, target)`` -> scalar tensor.
        batches: pairs ``(input, target)``, such as a ``DataLoader``; the model is called with the input, or with all
            inputs of ``(input, …, target)``. A mapping, as returned by tokenizers, is passed as ``model(**batch)`` and
            ``loss(output, batch)``.
        layout: use this layout instead of ``weight_layout(model)``.
        max_batches: maximum number of batches to use.

    Returns:
        A `ProbeReport` with ``.layers``, each with ``.name``, ``.share`` and ``.finding``; print it, or ``.plot()`` it.

    Raises:
        ValueError: ``batches`` is empty; the loss is not a scalar tensor, or does not depend on the parameters; the
            model is lazy and has not run yet, is sharded, or does not train.
        TypeError: a batch is neither a tuple that ends with the target nor a mapping.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> batch = torch.rand(32, 8), torch.rand(32, 2)
        >>> report = gradcentral.probe(model, torch.nn.functional.mse_loss, [batch])
        >>> report.layers[4].name, report.layers[4].finding
        ('2.weight', 'no effect: its input is already centered (as after LayerNorm)')
    """
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, not {max_batches}")
    layout = weight_layout(model) if layout is None else layout
    _check_trainable(layout)
    frozen: dict[str, Any] = {"vectors": None, "reason": "does not train"}
    entries = [entry if entry.parameter.requires_grad else replace(entry, **frozen) for entry in layout.entries]
    measured: dict[str, list[Effect]] = {entry.name: [] for entry in entries}
    whole, losses = [], []
    device = entries[0].parameter.device if entries else torch.device("cpu")
    modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
    inputs = InputMeans(model, layout)
    with preserve_state(*modules, generators=_generators(batches)), inputs, torch.enable_grad():
        if not getattr(model, "training", False):
            _set_training_mode(model)
        for batch in itertools.islice(batches, max_batches):
            value = loss_of(model, loss, to_device(batch, device))
            model.zero_grad(set_to_none=True)
            # autograd.grad would return None for parameters behind a reentrant checkpoint, without an error.
            value.backward()  # type: ignore[no-untyped-call]
            reached = [(entry, g) for entry in entries if (g := entry.parameter.grad) is not None]
            if not reached:
                raise ValueError("loss: does not depend on the model's parameters; compute it from the model's output")
            found = effects([(gradient, entry.vectors) for entry, gradient in reached])
            for (entry, _), effect in zip(reached, found, strict=True):
                measured[entry.name].append(effect)
            whole.append(combine_effects(found))
            losses.append(float(value.detach()))
    if not whole:
        raise ValueError("batches: empty; give at least one (input, target)")
    layers = []
    for entry in entries:
        seen = None if entry.vectors is None else inputs.of(entry.parameter)
        layers.append(LayerReport(entry.name, entry.vectors, entry.reason, tuple(measured[entry.name]), seen))
    return ProbeReport(tuple(layers), tuple(whole), tuple(losses), kinds_of(model))


def _check_trainable(layout: WeightLayout) -> None:
    for parameter, name in layout.names.items():
        if is_sharded(parameter):
            raise ValueError(f"model: {name} is sharded (a DTensor); probe the model before sharding it")
        if not is_lazy(parameter) and parameter.is_inference():
            raise ValueError(
                f"model: {name} was created in torch.inference_mode() and cannot train; create the model outside it"
            )
    if not any(parameter.requires_grad for parameter in layout.names):
        raise ValueError("model: none of its parameters requires a gradient; call requires_grad_() on those that train")


def _set_training_mode(model: nn.Module) -> None:
    with contextlib.suppress(NotImplementedError):  # a model of torch.export keeps the mode it was exported in
        model.train()


def _generators(batches: object) -> list[torch.Generator]:
    """Return the generators that a ``DataLoader`` and its sampler draw from."""
    holders = (batches, getattr(batches, "sampler", None))
    return [g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)]
