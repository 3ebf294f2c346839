"""What a layer's outputs do when a constant is added to all of its inputs (theorem 4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.paper.hessian import Batch
from gradcentral.paper.statements import NotMeasurableError

__all__ = ["Response", "counterpart", "intensity_responses", "plain_layers"]

# Not their subclasses, which may standardize the weight first: then the output is not wᵀx.
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Response(NamedTuple):
    """How the units of one layer answer to x → x + γ1, one number per unit in each tensor, in double precision.

    Attributes:
        name: of the layer's weight.
        predicted: γ·1ᵀw⁰, by the initial weights w⁰.
        measured: the change of the output, averaged over the batch and over positions.
        error: the largest |change − predicted| of any example at any position.
        scale: |γ|·√M·max(‖w⁰‖, ‖w‖), the largest change that weights of this length could make.
        intensity: the largest |x| of the layer's inputs.
    """

    name: str
    predicted: Tensor
    measured: Tensor
    error: Tensor
    scale: Tensor
    intensity: float


def intensity_responses(
    model: nn.Module, before: nn.Module, batch: Batch, gamma: float = 1.0, *, layout: WeightLayout | None = None
) -> list[Response]:
    """Add γ to all inputs of each layer, one layer at a time, and compare its outputs with γ·1ᵀw⁰.

    Measured on the inputs that the layers have when the model runs on ``batch``, at those positions of a convolution
    that no zero-padding touches, with the weights of now in double precision. Under placement ``"update"``, and under
    SGD without weight decay under both placements, 1ᵀw = 1ᵀw⁰ and the two agree.

    Args:
        model: trained; left as it is.
        before: the same model with its initial weights w⁰ (``copy.deepcopy`` it before training).
        batch: ``(input, target)``, or a mapping, passed as ``model(**batch)``; the target is not looked at.
        gamma: the constant γ, in the unit of the layers' inputs.
        layout: which layers: their weights are in it; None: ``weight_layout(model)``.

    Returns:
        A `Response` for each Linear and convolution (these very classes) that runs and has such positions.

    Raises:
        NotMeasurableError: there is no such layer; a ValueError.
        ValueError: gamma is 0; ``before`` is another model.

    Source: Yong et al. 2020, theorem 4.1: (wᵗ)ᵀ(x + γ1) − (wᵗ)ᵀx = γ1ᵀw⁰.

    Examples:
        >>> import copy, torch, gradcentral
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> before = copy.deepcopy(model)
        >>> optimizer = gradcentral.SGD(model, lr=0.1)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> (response,) = intensity_responses(model, before, (torch.randn(5, 4), None), gamma=2.0)
        >>> bool(response.error.max() < 1e-6)
        True
    """
    if gamma == 0:
        raise ValueError("gamma must not be 0: adding nothing changes nothing")
    layers = dict(plain_layers(model, weight_layout(model) if layout is None else layout))
    inputs = _inputs(model, layers, batch)
    found = []
    with torch.no_grad():
        for name, x in inputs.items():
            weight = f"{name}.weight".lstrip(".")
            response = _response(
                weight, layers[name], counterpart(before, weight, layers[name].get_parameter("weight")), x, gamma
            )
            if response is not None:
                found.append(response)
    if not found:
        raise NotMeasurableError(
            "model: no centered Linear or convolution ran at a position that no padding touches (subclasses and "
            "parametrized ones are not looked at)"
        )
    return found


def plain_layers(model: nn.Module, layout: WeightLayout) -> Iterator[tuple[str, nn.Module]]:
    """The Linear and convolution layers whose weight the layout centers, with their names."""
    for name, module in model.named_modules():
        if type(module) in _PLAIN and module._parameters.get("weight") in layout:
            yield name, module


def counterpart(before: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The initial weights of a parameter, from a copy of its model."""
    try:
        initial = before.get_parameter(name)
    except AttributeError:
        initial = None
    if initial is None or initial.shape != weight.shape:
        raise ValueError(f"before: it has no such {name}: give a copy of the model, made before training")
    return initial


def _inputs(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """The input of each layer's first call."""
    inputs: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                inputs.setdefault(name, args[0].detach().double())

        return layer.register_forward_pre_hook(remember)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        with preserve_state(model), torch.no_grad():
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0])
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _response(name: str, layer: nn.Module, initial: Tensor, x: Tensor, gamma: float) -> Response | None:
    w, w0 = layer.get_parameter("weight").double(), initial.double()
    units, fan_in = w.shape[0], w[0].numel()

    def output(weight: Tensor, x: Tensor) -> Tensor:
        """[positions, units], without the bias, which no change of x changes."""
        bias = {"bias": w.new_zeros(units)} if layer._parameters.get("bias") is not None else {}
        y: Tensor = functional_call(layer, {"weight": weight, **bias}, (x,))
        return y.movedim(1 - w.ndim, -1).reshape(-1, units)

    # Where padding hides some of the inputs, fewer than M ones are summed.
    whole = (output(torch.ones_like(w), torch.ones_like(x)).round() == fan_in).all(1)
    if not whole.any():
        return None
    change = (output(w, x + gamma) - output(w, x))[whole]
    predicted = gamma * w0.flatten(1).sum(1)
    length = torch.maximum(w.flatten(1).norm(dim=1), w0.flatten(1).norm(dim=1))
    return Response(
        name,
        predicted,
        change.mean(0),
        (change - predicted).abs().amax(0),
        abs(gamma) * fan_in**0.5 * length,
        float(x.abs().max()),
    )
