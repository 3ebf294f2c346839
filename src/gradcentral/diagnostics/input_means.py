"""How much of a layer's input is in its mean, which explains how much of its gradient centering removes."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from gradcentral.layout import WeightLayout
from gradcentral.weight_vectors import WeightVectors

__all__ = ["InputMean", "InputMeans"]


class InputMean(NamedTuple):
    """Mean of the inputs x that the weight vectors of one parameter are multiplied with.

    Attributes:
        mean: over all inputs and all their elements.
        offset: fraction of the inputs' energy that is in the mean of each input, ‖eᵀx‖²/‖x‖²: 0 if every x is centered
            (as after LayerNorm), 1 if every x is constant. The mean of a weight vector's gradient is Σ δ·mean(x).
    """

    mean: float
    offset: float


class InputMeans:
    """Observes the inputs of a model's layers during the forward passes in a ``with`` block.

    Covers the layers that apply one centered parameter to their first argument: Linear and similar layers,
    convolutions, the input projection of attention, and the input weights of recurrent layers.
    """

    def __init__(self, model: nn.Module, layout: WeightLayout) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []
        self._observed = [(module, parameter, layout[parameter]) for module, parameter in _owners(model, layout)]

    def __enter__(self) -> InputMeans:
        for module, parameter, vectors in self._observed:
            hook = functools.partial(self._add, parameter, vectors)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def of(self, parameter: Tensor) -> InputMean | None:
        """Return the mean of a parameter's inputs, or None if they were not observed."""
        if (sums := self._sums.get(parameter)) is None:
            return None
        count, total, in_mean, energy = sums.tolist()
        return InputMean(total / count, in_mean / energy if energy > 0 else math.nan)

    @torch.no_grad()
    def _add(self, parameter: Tensor, vectors: WeightVectors, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _input(module, args, kwargs)
        if x is not None and (sums := _sums_of(module, x.detach(), parameter, vectors)) is not None:
            self._sums[parameter] = self._sums.get(parameter, 0.0) + sums


def _owners(model: nn.Module, layout: WeightLayout) -> list[tuple[nn.Module, Tensor]]:
    """Pair each module that has exactly one centered parameter with it, if it is applied to the first argument."""
    found: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, (ParametrizationList, nn.Bilinear)):  # Bilinear multiplies two arguments
            continue
        parameters = [p for p in module.parameters(recurse=False) if p in layout]
        for original in getattr(module, "parametrizations", {}).values():
            parameters += [p for p in original.parameters(recurse=False) if p in layout]
        # The hidden weights of recurrent layers read a state that no hook observes.
        if isinstance(module, nn.RNNBase):
            parameters = [p for p in parameters if p is module.weight_ih_l0]
        parameters = [p for p in parameters if "weight_hh" not in layout.names[p]]
        if len(parameters) == 1:
            found.append((module, parameters[0]))
    return found


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = (*args, *kwargs.values())
    if isinstance(module, nn.MultiheadAttention) and len(given) >= 3 and not given[0] is given[1] is given[2]:
        return None  # one parameter is applied to query, key and value
    first = given[0] if given else None
    if isinstance(first, nn.utils.rnn.PackedSequence):
        first = first.data
    return first if isinstance(first, Tensor) else None


def _sums_of(module: nn.Module, x: Tensor, parameter: Tensor, vectors: WeightVectors) -> Tensor | None:
    """Compute the number of inputs of single weight vectors, and the sums of their mean, M·mean² and ‖x‖²."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    x = x.float() if x.dtype.itemsize < 4 else x
    if isinstance(module, _ConvNd):
        axes = len(module.kernel_size)
        if x.ndim not in (axes + 1, axes + 2) or x.shape[-axes - 1] != module.in_channels:
            return None  # a subclass with another first argument
    if isinstance(module, _ConvTransposeNd):
        # A position is multiplied with one tap at a time, so an input of a weight vector is its group's channels there.
        means, energies, size = _channel_means(module, x)
    elif isinstance(module, _ConvNd):
        means, energies, size = _patch_means(module, x, parameter)
    elif x.ndim and x.shape[-1] == vectors.fan_in:
        means, energies, size = x.mean(-1), x.square().sum(-1), vectors.fan_in
    else:
        return None
    count = means.new_tensor(means.numel())
    return torch.stack([count, means.sum(), size * means.square().sum(), energies.sum()]).cpu().double()


def _patch_means(module: _ConvNd, x: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute mean and energy of every patch that a filter covers, padding included, by convolving with ones."""
    # The shape comes from the parameter: reading module.weight would compute, and perhaps update, a parametrization.
    ones = x.new_ones(module.groups, *parameter.shape[1:])
    size = math.prod(ones.shape[1:])
    convolve: Any = module._conv_forward
    return convolve(x, ones, None) / size, convolve(x.square(), ones, None), size


def _channel_means(module: _ConvTransposeNd, x: Tensor) -> tuple[Tensor, Tensor, int]:
    channels = x.ndim - len(module.kernel_size) - 1
    grouped: Tensor = x.unflatten(channels, (module.groups, -1))  # type: ignore[no-untyped-call]
    size = grouped.shape[channels + 1]
    return grouped.mean(channels + 1), grouped.square().sum(channels + 1), size
