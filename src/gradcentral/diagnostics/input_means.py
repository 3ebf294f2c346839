"""The fraction of a layer's input that is in its mean, which explains the share that centering removes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from gradcentral.layout import WeightLayout
from gradcentral.projection import positive_or_one
from gradcentral.weight_vectors import WeightVectors

__all__ = ["InputMean", "InputMeans"]


class InputMean(NamedTuple):
    """Mean of the inputs x that the weight vectors of one parameter multiply.

    Attributes:
        mean: mean over all inputs and all their elements.
        offset: fraction of the inputs' energy that is in the mean of each input, ‖eᵀx‖²/‖x‖²: 0 if every x is centered
            (as after LayerNorm), 1 if every x is constant. The mean of a weight vector's gradient is Σ δ·mean(x).
    """

    mean: float
    offset: float


class InputMeans:
    """Means of the inputs of a model's layers, observed during the forward passes in a ``with`` block.

    It covers the layers that apply one centered parameter to their first argument: Linear and similar layers,
    convolutions, the input projection of attention, and the input weights of recurrent layers.
    """

    def __init__(self, model: nn.Module, layout: WeightLayout) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._hooks = ExitStack()
        self._observed = [(module, parameter, layout[parameter]) for module, parameter in _owners(model, layout)]

    def __enter__(self) -> InputMeans:
        with ExitStack() as hooks:
            for module, parameter, vectors in self._observed:
                hook = functools.partial(self._add, parameter, vectors)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def of(self, parameter: Tensor) -> InputMean | None:
        """Return the mean of a parameter's inputs, or None if they were not observed."""
        if (sums := self._sums.get(parameter)) is None:
            return None
        count, total, in_mean, energy = sums.tolist()
        return InputMean(total / count, in_mean / energy if energy > 0 else math.nan)

    @torch.no_grad()
    def _add(self, parameter: Tensor, vectors: WeightVectors, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _input(module, args, kwargs)
        try:
            sums = None if x is None else _sums_of(module, _summable(x.detach()), parameter, vectors)
        except Exception:  # a layer may accept a tensor without these operations; its input is then not observed
            return
        if sums is not None:
            self._sums[parameter] = self._sums.get(parameter, 0.0) + sums


def _owners(model: nn.Module, layout: WeightLayout) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each module with exactly one centered parameter, and the parameter, if it applies to the first argument."""
    for module in model.modules():
        # Bilinear multiplies two arguments; scripted modules accept no hooks.
        if isinstance(module, (ParametrizationList, nn.Bilinear, torch.jit.ScriptModule)):
            continue
        holders = (module, *getattr(module, "parametrizations", {}).values())
        parameters = [p for holder in holders for p in holder.parameters(recurse=False) if p in layout]
        # The hidden weights of recurrent layers read a state that no hook observes.
        if isinstance(module, nn.RNNBase):
            parameters = [p for p in parameters if p is module.weight_ih_l0]
        parameters = [p for p in parameters if "weight_hh" not in layout.names[p]]
        if len(parameters) == 1:
            yield module, parameters[0]


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = (*args, *kwargs.values())
    if isinstance(module, nn.MultiheadAttention) and len(given) >= 3 and not given[0] is given[1] is given[2]:
        return None  # one parameter is applied to query, key and value
    first = given[0] if given else None
    if isinstance(first, nn.utils.rnn.PackedSequence):
        first = first.data
    return first if isinstance(first, Tensor) else None


def _summable(x: Tensor) -> Tensor:
    """Return the same inputs as a dense tensor, or as a sparse one with coordinates."""
    if x.is_nested:
        return torch.cat([part.flatten(0, -2) for part in x.unbind()])
    return x if x.layout == torch.strided else x.to_sparse().coalesce()  # compressed rows, columns or blocks


def _sums_of(module: nn.Module, x: Tensor, parameter: Tensor, vectors: WeightVectors) -> Tensor | None:
    """Compute the number of inputs of a weight vector, and the sums of their mean, M·mean² and ‖x‖²."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    x = x.float() if x.dtype.itemsize < 4 else x
    # The squares of very small and very large inputs do not fit into float32.
    largest = positive_or_one((x.values() if x.is_sparse else x).abs().amax())
    x = x / largest
    if isinstance(module, _ConvNd):
        channels = x.ndim - len(module.kernel_size) - 1
        if channels not in (0, 1) or x.shape[channels] != module.in_channels:
            return None  # a subclass with another first argument
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        # The sums over the patches that a filter covers, padding included, are a convolution with ones. The shape of
        # the ones is the parameter's: reading module.weight would compute, and might update, a parametrization.
        convolve: Any = module._conv_forward
        ones = x.new_ones(module.groups, *parameter.shape[1:])
        size, sums, energies = ones[0].numel(), convolve(x, ones, None), convolve(x.square(), ones, None)
    else:
        if isinstance(module, _ConvTransposeNd):
            # A position is multiplied with one tap at a time, so an input is a group's channels at one position.
            x = torch.unflatten(x, channels, (module.groups, -1)).movedim(channels + 1, -1)
        elif x.shape[-1:] != (vectors.fan_in,):
            return None
        size, sums, energies = x.shape[-1], x.sum(-1), x.square().sum(-1)
    count = sums.new_tensor(sums.numel())
    found = torch.stack([count, sums.sum() / size, sums.square().sum() / size, energies.sum(), largest]).cpu().double()
    return found[:4] * found[4] ** found.new_tensor([0, 1, 2, 2])
