"""How much of a layer's input lies in its mean: the cause of what centering removes."""

from __future__ import annotations

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
    """The mean of the inputs that a weight vector meets.

    Attributes:
        mean: of all of them.
        offset: part of their energy that lies in the mean of each single one, ‖eᵀx‖²/‖x‖², between 0 (centered, as
            after LayerNorm) and 1 (constant). The mean of a weight vector's gradient is Σ δ·mean(x).
    """

    mean: float
    offset: float


class InputMeans:
    """Watches the inputs of a model's layers; use it in a ``with`` block around forward passes.

    Knows a layer whose only centered parameter is applied to its first input: Linear and its like, convolutions,
    attention's input projection, the input weights of a recurrent layer.
    """

    def __init__(self, model: nn.Module, layout: WeightLayout) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []
        self._watched = [
            (module, parameter, layout[parameter])
            for module, parameter in _owners(model, layout)
            if _reads_first_input(module, layout.names[parameter])
        ]

    def __enter__(self) -> InputMeans:
        for module, parameter, vectors in self._watched:

            def look(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                parameter: Tensor = parameter,
                vectors: WeightVectors = vectors,
            ) -> None:
                x = _input(module, args, kwargs)
                with torch.no_grad():
                    if x is not None and (sums := _sums(module, x.detach(), parameter, vectors)) is not None:
                        self._sums[parameter] = self._sums.get(parameter, 0.0) + sums

            self._hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def of(self, parameter: Tensor) -> InputMean | None:
        """What was seen before a parameter; None where nothing was, or where this does not know how to look."""
        if (sums := self._sums.get(parameter)) is None:
            return None
        count, total, in_mean, energy = sums.tolist()
        return InputMean(total / count, in_mean / energy if energy > 0 else math.nan)


def _owners(model: nn.Module, layout: WeightLayout) -> list[tuple[nn.Module, Tensor]]:
    """Each centered parameter with the module that uses it, where it is the only one of that module."""
    found: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            continue
        parameters = [p for p in module.parameters(recurse=False) if p in layout]
        for original in getattr(module, "parametrizations", {}).values():
            parameters += [p for p in original.parameters(recurse=False) if p in layout]
        if isinstance(module, nn.RNNBase):
            parameters = [p for p in parameters if p is module.weight_ih_l0]
        if len(parameters) == 1:
            found.append((module, parameters[0]))
    return found


def _reads_first_input(module: nn.Module, name: str) -> bool:
    # Bilinear reads two; a recurrent layer's hidden weights read what no hook sees.
    return not isinstance(module, nn.Bilinear) and "weight_hh" not in name


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a layer's weights are applied to: its first argument."""
    given = (*args, *kwargs.values())
    if isinstance(module, nn.MultiheadAttention) and len(given) >= 3 and not given[0] is given[1] is given[2]:
        return None  # its weights are applied to three different things
    first = given[0] if given else None
    if isinstance(first, nn.utils.rnn.PackedSequence):
        first = first.data
    return first if isinstance(first, Tensor) else None


def _sums(module: nn.Module, x: Tensor, parameter: Tensor, vectors: WeightVectors) -> Tensor | None:
    """Number of weight vectors' inputs, sums of their means, of M·mean² and of their energies ‖x‖²."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    x = x.float() if x.dtype.itemsize < 4 else x
    if isinstance(module, _ConvNd) and not _fits(module, x):
        return None  # a subclass whose first argument is something else
    if isinstance(module, _ConvTransposeNd):
        # Each position is met through all taps; what a unit sees of it at once is its group's channels.
        means, energies, size = _of_channels(module, x)
    elif isinstance(module, _ConvNd):
        means, energies, size = _of_patches(module, x, parameter)
    elif x.ndim and x.shape[-1] == vectors.fan_in:
        means, energies, size = x.mean(-1), x.square().sum(-1), vectors.fan_in
    else:
        return None
    count = means.new_tensor(means.numel())
    return torch.stack([count, means.sum(), size * means.square().sum(), energies.sum()]).cpu().double()


def _fits(module: _ConvNd, x: Tensor) -> bool:
    axes = len(module.kernel_size)
    return x.ndim in (axes + 1, axes + 2) and x.shape[-axes - 1] == module.in_channels


def _of_patches(module: _ConvNd, x: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and energy of every patch that a filter is laid on, padding included."""
    # Not module.weight: a parametrized one is computed, and may change, each time it is looked at.
    ones = x.new_ones(module.groups, *parameter.shape[1:])
    size = math.prod(ones.shape[1:])
    convolve: Any = module._conv_forward
    return convolve(x, ones, None) / size, convolve(x.square(), ones, None), size


def _of_channels(module: _ConvTransposeNd, x: Tensor) -> tuple[Tensor, Tensor, int]:
    channels = x.ndim - len(module.kernel_size) - 1
    grouped: Tensor = x.unflatten(channels, (module.groups, -1))  # type: ignore[no-untyped-call]
    size = grouped.shape[channels + 1]
    return grouped.mean(channels + 1), grouped.square().sum(channels + 1), size
