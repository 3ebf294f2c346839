"""Theorem 4.1 and the hyperplane behind it: training with GC keeps eᵀw, and so each unit's response to a constant."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import Batch, along_e, centered_layout, double_rows
from gradcentral.paper.measurement import Measurement, NotMeasurableError, measure_largest, relative

__all__ = ["THEOREM_4_1", "hyperplane", "intensity_responses", "intensity_shift", "plain_layers"]

THEOREM_4_1 = "x → x + γ1 changes an output by γ1ᵀw⁰ alone"

# Only these classes: a subclass may standardize its weight first, so that its output is not wᵀx.
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Response(NamedTuple):
    """The change of one layer's outputs under x → x + γ1; tensors have one number per unit, in double precision."""

    name: str  # the name of the layer's weight
    predicted: Tensor  # γ·1ᵀw⁰, from the initial weights w⁰
    measured: Tensor  # the change of the output, averaged over the batch and over positions
    error: Tensor  # the largest |change − predicted| over the batch and over positions
    scale: Tensor  # |γ|·√M·max(‖w⁰‖, ‖w‖), the largest change that weights of this length could cause
    intensity: float  # the largest |x| of the layer's inputs


def hyperplane(model: nn.Module, before: nn.Module, steps: int, layout: WeightLayout | None = None) -> Measurement:
    """Measure eᵀ(w − w⁰) = 0 after training: the weights have not left the hyperplane in which they started.

    This holds for placement ``"update"``, and for both placements under SGD without weight decay.

    Args:
        model: the trained model.
        before: the same model with its initial weights w⁰ (``copy.deepcopy(model)`` before training).
        steps: the number of optimizer steps between them; each may round every weight once.
        layout: the weight vectors of ``model`` to measure; by default ``weight_layout(model)``.

    Raises:
        ValueError: nothing is centered; ``before`` is not a copy of the model; steps < 1.

    Source: Yong et al. 2020, eq. 4.

    Examples:
        >>> import copy, gradcentral
        >>> model = torch.nn.Linear(5, 2)
        >>> before = copy.deepcopy(model)
        >>> optimizer = gradcentral.AdamW(model, lr=0.1, placement="update")
        >>> model(torch.randn(8, 5)).square().sum().backward()
        >>> optimizer.step()
        >>> hyperplane(model, before, steps=1).holds
        True
    """
    layout, drifts = centered_layout(model, layout), {}
    for w, vectors in layout.items():
        name = layout.names[w]
        now, start = double_rows(w, vectors), double_rows(_initial_weight(before, name, w), vectors)
        drifts[name] = relative(along_e(now - start), torch.maximum(now.norm(dim=1), start.norm(dim=1)))
    statement = "training stays on the hyperplane through w⁰ that is orthogonal to e"
    return _after_training("eq. 4", statement, "|eᵀ(w − w⁰)| / ‖w‖", drifts, steps, layout)


def intensity_shift(
    model: nn.Module, before: nn.Module, batch: Batch, steps: int, gamma: float = 1, layout: WeightLayout | None = None
) -> Measurement:
    """Measure theorem 4.1: adding γ to all inputs of a unit changes its output by γ·1ᵀw⁰, after any training.

    The arguments and errors are those of `hyperplane` and of `intensity_responses`, which has the numbers per unit.

    Source: Yong et al. 2020, theorem 4.1, eq. 5.

    Examples:
        >>> import copy
        >>> model = nn.Linear(5, 2)
        >>> intensity_shift(model, copy.deepcopy(model), (torch.randn(8, 5), None), steps=1).holds
        True
    """
    layout = centered_layout(model, layout)
    responses = intensity_responses(model, before, batch, gamma, layout=layout)
    errors = {response.name: relative(response.error, response.scale) for response in responses}
    statement, formula = f"{THEOREM_4_1} (γ = {gamma:g})", "|wᵀ(x+γ1) − wᵀx − γ1ᵀw⁰| / γ√M‖w‖"
    measured = _after_training("theorem 4.1", statement, formula, errors, steps, layout)
    # The rounding errors of the two subtracted outputs, in double precision, are proportional to x.
    outputs = 8 * (1 + max(response.intensity for response in responses) / abs(gamma))
    return measured._replace(bound=measured.bound + outputs * torch.finfo(torch.float64).eps)


def intensity_responses(
    model: nn.Module, before: nn.Module, batch: Batch, gamma: float = 1, *, layout: WeightLayout | None = None
) -> list[Response]:
    """Add γ to all inputs of each layer, one layer at a time, and compare the change of its outputs with γ·1ᵀw⁰.

    Each layer gets the inputs that it has when the model runs on ``batch``. Positions of a convolution that
    zero-padding touches are not measured. Where 1ᵀw = 1ᵀw⁰ (see `hyperplane`), the two numbers agree.

    Args:
        model, before: as in `hyperplane`; they are not changed.
        batch: ``(input, target)``, or a mapping, used as ``model(**batch)``; the target is ignored.
        gamma: the constant γ, in the unit of the layers' inputs.
        layout: the layers to measure, by their weights; by default ``weight_layout(model)``.

    Returns:
        One `Response` per Linear and convolution layer (not their subclasses) that runs and has such positions.

    Raises:
        NotMeasurableError: there is no such layer.
        ValueError: nothing is centered; gamma is 0; ``before`` is not a copy of the model.

    Source: Yong et al. 2020, theorem 4.1: (wᵗ)ᵀ(x + γ1) − (wᵗ)ᵀx = γ1ᵀw⁰, which eq. 5 prints with the opposite sign.

    Examples:
        >>> import copy
        >>> layer = torch.nn.Linear(4, 3)
        >>> (response,) = intensity_responses(layer, copy.deepcopy(layer), (torch.randn(5, 4), None), gamma=2.0)
        >>> bool(response.error.max() < 1e-6)
        True
    """
    if gamma == 0:
        raise ValueError("gamma must not be 0: adding 0 changes nothing")
    layers, responses = plain_layers(model, centered_layout(model, layout)), []
    with torch.no_grad():
        for name, x in _inputs(model, layers, batch).items():
            w = layers[name].get_parameter("weight").double()
            w0, output = _initial_weight(before, name, w).double(), partial(_output, layers[name])
            # With weights and inputs of ones, an output that padding touches is less than M.
            fan_in = w[0].numel()
            inside = (output(torch.ones_like(w), torch.ones_like(x)).round() == fan_in).all(1)
            if inside.any():
                change, predicted = (output(w, x + gamma) - output(w, x))[inside], gamma * w0.flatten(1).sum(1)
                length = torch.maximum(w.flatten(1).norm(dim=1), w0.flatten(1).norm(dim=1))
                error, scale = (change - predicted).abs().amax(0), abs(gamma) * fan_in**0.5 * length
                responses.append(Response(name, predicted, change.mean(0), error, scale, float(x.abs().max())))
    if not responses:
        raise NotMeasurableError(
            "model: no centered Linear or convolution layer ran at a position that no padding touches (subclasses and "
            "parametrized layers are skipped)"
        )
    return responses


def plain_layers(model: nn.Module, layout: WeightLayout) -> dict[str, nn.Module]:
    """Return the Linear and convolution layers whose weight the layout centers, by the name of the weight."""
    return {
        f"{name}.weight".lstrip("."): module
        for name, module in model.named_modules()
        if type(module) in _PLAIN and module._parameters.get("weight") in layout
    }


def _initial_weight(before: nn.Module, name: str, weight: Tensor) -> Tensor:
    initial = dict(before.named_parameters(remove_duplicate=False)).get(name)
    if initial is None or initial.shape != weight.shape:
        raise ValueError(
            f"before: no {name} of shape {tuple(weight.shape)}; give copy.deepcopy(model), created before training"
        )
    return initial


def _inputs(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """Return the input of each layer's first call."""
    inputs: dict[str, Tensor] = {}

    def record(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            inputs.setdefault(name, args[0].detach().double())

    with preserve_state(model), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(record, name)))
        model(**batch) if isinstance(batch, Mapping) else model(batch[0])
    return inputs


def _output(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Compute ``[positions, units]`` without the bias, which cancels in a difference of outputs."""
    bias = {"bias": weight.new_zeros(len(weight))} if layer._parameters.get("bias") is not None else {}
    y: Tensor = functional_call(layer, {"weight": weight, **bias}, (x,))
    return y.movedim(1 - weight.ndim, -1).reshape(-1, len(weight))


def _after_training(
    source: str, statement: str, formula: str, values: dict[str, Tensor], steps: int, layout: WeightLayout
) -> Measurement:
    """Measure an equation that holds up to one rounding error of w per optimizer step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    measured = measure_largest(source, statement, formula, values, steps, layout)
    return measured._replace(allowance=f"{measured.allowance}: one rounding of w per step")
