"""How near to zero initial weight vectors have their means, and how to put them there exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.projection import center_

__all__ = ["SCHEMES", "InitialMeans", "center_weights_", "initial_means"]

_Scheme = tuple[Callable[..., Any], float]

_RELU = nn.init.calculate_gain("relu")
_SCHEMES: dict[str, _Scheme] = {
    "xavier_uniform": (nn.init.xavier_uniform_, 1.0),
    "xavier_normal": (nn.init.xavier_normal_, 1.0),
    "kaiming_uniform": (nn.init.kaiming_uniform_, _RELU),
    "kaiming_normal": (nn.init.kaiming_normal_, _RELU),
}
SCHEMES = tuple(_SCHEMES)
"""The names that `initial_means` takes: functions of ``torch.nn.init``, Kaiming's with their gain √2 for ReLU."""


class InitialMeans(NamedTuple):
    """The means of a layer's initial weight vectors.

    Attributes:
        absolute: |mean(w⁰)| of each weight vector, shape ``[count]``.
        expected: their standard deviation by theory, σ/√M for weights of standard deviation σ.
    """

    absolute: Tensor
    expected: float


def initial_means(shape: Sequence[int], scheme: str, *, seed: int = 0) -> InitialMeans:
    """|mean(w⁰)| of the weight vectors of one layer under an initialization, drawn and by theory.

    The weights are independent with mean zero, so that the mean of M of them has standard deviation σ/√M:
    σ² = 2/(fan-in + fan-out) under Xavier, 2/fan-in under Kaiming for ReLU.

    Args:
        shape: of a Linear or convolution weight, ``[out, in, …]``; a weight vector runs over all axes but the first.
        scheme: one of `SCHEMES`.
        seed: of the draw; the generators in use elsewhere are left alone.

    Raises:
        ValueError: an unknown scheme, or a shape of fewer than two axes.

    Source: Yong et al. 2020, section 4.1 (the mean of w⁰ is near zero); Glorot and Bengio 2010; He et al. 2015.

    Examples:
        >>> means = initial_means((64, 32, 3, 3), "kaiming_normal")
        >>> means.absolute.shape, round(means.expected, 5) == round((2 / 288) ** 0.5 / 288**0.5, 5)
        (torch.Size([64]), True)
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, not {scheme!r}")
    if len(shape) < 2:
        raise ValueError(f"shape must be [out, in, …], not {tuple(shape)}")
    fill, gain = _SCHEMES[scheme]
    weight = torch.empty(tuple(shape), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    taps = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * taps, shape[0] * taps
    if scheme.startswith("xavier"):
        fill(weight, gain=gain, generator=generator)
        deviation = gain * math.sqrt(2 / (fan_in + fan_out))
    else:
        fill(weight, nonlinearity="relu", generator=generator)
        deviation = gain / math.sqrt(fan_in)
    return InitialMeans(weight.flatten(1).mean(1).abs(), deviation / math.sqrt(fan_in))


def center_weights_(model: nn.Module, layout: WeightLayout | None = None) -> WeightLayout:
    """Make the mean of every weight vector zero, to rounding: w ← Φ(w), in place. For a model not trained yet.

    Trained with placement ``"update"`` the means then stay there, and no unit's output changes when a constant is added
    to all of its inputs (theorem 4.1 with 1ᵀw⁰ = 0). A trained model computes something else afterwards.

    Args:
        model: freshly initialized.
        layout: which weight vectors; None: ``weight_layout(model)``.

    Returns:
        The layout used.

    Raises:
        ValueError: nothing to center; a lazy parameter has no values yet; the layout is another model's.

    Source: Yong et al. 2020, section 4.1: the smaller |mean(w⁰)|, the less sensitive the output.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(100, 3)
        >>> layout = center_weights_(model)
        >>> bool(model.weight.mean(1).abs().max() < 1e-8)
        True
    """
    layout = weight_layout(model) if layout is None else layout
    if layout.pending:
        raise ValueError("model: a lazy parameter has no values yet: run one forward pass of the model first")
    if not layout:
        raise ValueError(f"nothing to center: {layout.summary()}")
    own = {*model.parameters()}
    for parameter in layout:
        if parameter not in own:
            raise ValueError(f"layout: {layout.names[parameter]} is not the model's: pass weight_layout(model)")
    with torch.no_grad():
        for parameter, vectors in layout.items():
            center_(parameter, vectors)
    return layout
