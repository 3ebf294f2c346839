"""Section 4.1 of the paper: the means of initial weight vectors are near zero."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradcentral.initialization import center_weights_
from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import along_e, centered_layout, double_rows
from gradcentral.paper.measurement import CENTERING, Measurement, NotMeasurableError, measure_largest, relative
from gradcentral.paper.theorem_4_1 import plain_layers

__all__ = ["SCHEMES", "centered_initialization", "initial_means", "initial_means_near_zero", "sampled_means"]

SECTION_4_1 = "the means of initial weight vectors are near zero"
SCHEMES = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")
"""The initializations of ``torch.nn.init`` that `initial_means` accepts, with their default gains: 1 and √2 (ReLU)."""


class InitialMeans(NamedTuple):
    """The means of a layer's initial weight vectors."""

    absolute: Tensor  # |mean(w⁰)| of each weight vector, shape [count]
    expected: float  # the theoretical standard deviation of these means, σ/√M for weights of standard deviation σ


def initial_means(shape: Sequence[int], scheme: str, *, seed: int = 0) -> InitialMeans:
    """Sample ``|mean(w⁰)|`` of the weight vectors of one initialized layer, and compute its theoretical scale.

    The mean of M independent weights has standard deviation σ/√M, where σ² = 2/(fan-in + fan-out) under Xavier and
    2/fan-in under Kaiming initialization.

    Args:
        shape: the shape of a Linear or convolution weight, ``[out, in, …]``.
        scheme: ``"xavier_uniform"``, ``"xavier_normal"``, ``"kaiming_uniform"`` or ``"kaiming_normal"``.
        seed: the seed of the sample; the global generators are not used.

    Raises:
        ValueError: the scheme is unknown; the shape has fewer than two axes.

    Source: Yong et al. 2020, section 4.1; Glorot and Bengio 2010; He et al. 2015.

    Examples:
        >>> means = initial_means((64, 32, 3, 3), "kaiming_normal")
        >>> means.absolute.shape, round(means.expected, 5) == round((2 / 288) ** 0.5 / 288**0.5, 5)
        (torch.Size([64]), True)
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: unknown initialization {scheme!r}; choose from {', '.join(SCHEMES)}")
    if len(shape) < 2:
        raise ValueError(f"shape must be [out, in, …], not {tuple(shape)}")
    weight = torch.empty(tuple(shape), dtype=torch.float64, device="cpu")
    getattr(nn.init, f"{scheme}_")(weight, generator=torch.Generator("cpu").manual_seed(seed))
    fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
    variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 2 / fan_in
    return InitialMeans(weight.flatten(1).mean(1).abs(), math.sqrt(variance / fan_in))


def sampled_means(shapes: Iterable[Sequence[int]], scheme: str, seed: int) -> dict[str, Tensor]:
    """Sample `initial_means` of several layers: |mean(w⁰)|, and |mean(w⁰)| in units of σ/√M."""
    # Each layer has its own seed; otherwise layers of the same shape would get the same weights.
    samples = [initial_means(shape, scheme, seed=seed + index) for index, shape in enumerate(shapes)]
    absolute = torch.cat([means.absolute for means in samples])
    return {"absolute": absolute, "relative": torch.cat([means.absolute / means.expected for means in samples])}


def initial_means_near_zero(model: nn.Module, layout: WeightLayout | None = None) -> list[Measurement]:
    """Measure mean(w⁰) ≈ 0 under Xavier and Kaiming initialization, for layers of the model's shapes.

    For each scheme of `initial_means`, this measures the deviation of the root mean square of mean(w⁰), over all
    weight vectors, from σ/√M.

    Args:
        model: a model whose centered Linear and convolution layers give the shapes; its weights are not used.
        layout: the layers to measure, by their weights; by default ``weight_layout(model)``.

    Raises:
        NotMeasurableError: the model has no such layer.

    Source: Yong et al. 2020, section 4.1.

    Examples:
        >>> all(m.holds for m in initial_means_near_zero(nn.Linear(50, 20)))
        True
    """
    layers = plain_layers(model, centered_layout(model, layout)).values()
    shapes = [layer.get_parameter("weight").shape for layer in layers]
    if not shapes:
        raise NotMeasurableError("model: no centered Linear or convolution layer to initialize")
    found = []
    for scheme in SCHEMES:
        means = sampled_means(shapes, scheme, seed=0)
        count = len(means["relative"])
        value = abs(float(means["relative"].square().mean().sqrt()) - 1)
        bound, allowance = 5 / math.sqrt(2 * count), f"5 standard errors of {count} means"
        statement, formula = f"{SECTION_4_1} ({scheme})", "| rms(mean(w⁰) / (σ/√M)) − 1 |"
        where = f"median |mean(w⁰)| {float(means['absolute'].median()):.2g}"
        found.append(Measurement("section 4.1", statement, formula, value, bound, allowance, where))
    return found


def centered_initialization(model: nn.Module, layout: WeightLayout | None = None) -> Measurement:
    """Measure 1ᵀw⁰ = 0 after `center_weights_`, on a copy of the model.

    Raises:
        ValueError: nothing is centered; the model cannot be copied.

    Source: Yong et al. 2020, section 4.1: the smaller ``|mean(w⁰)|``, the less an output changes with γ.

    Examples:
        >>> centered_initialization(nn.Linear(50, 20)).holds
        True
    """
    check_copyable(model)
    copied, layout = copy.deepcopy((model, centered_layout(model, layout)))
    lengths = {w: double_rows(w, vectors).norm(dim=1) for w, vectors in layout.items()}
    center_weights_(copied, layout)
    sums = {layout.names[w]: relative(along_e(double_rows(w, vectors)), lengths[w]) for w, vectors in layout.items()}
    statement = "center_weights_ sets 1ᵀw⁰ to zero"
    return measure_largest("section 4.1", statement, "|eᵀΦ(w⁰)| / ‖w⁰‖", sums, CENTERING, layout)


def check_copyable(model: nn.Module) -> None:
    """Check that no module keeps a tensor computed from parameters, which ``copy.deepcopy`` refuses."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"model: {f'{name}.{attribute}'.lstrip('.')} is a plain attribute computed from parameters, so the "
                    "model cannot be copied; instead of torch.nn.utils.weight_norm or spectral_norm, use "
                    "torch.nn.utils.parametrizations.weight_norm or torch.nn.utils.parametrizations.spectral_norm"
                )
