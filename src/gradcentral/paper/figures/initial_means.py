"""The means of ResNet-50's initial weight vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradcentral.paper.figure import Figure
from gradcentral.paper.initial_weights import sampled_means
from gradcentral.paper.study import Study
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["initial_means_figure"]

_SCHEMES = {"xavier_normal": "Xavier", "kaiming_normal": "Kaiming"}


def initial_means_figure(study: Study) -> Figure:
    """Figure 3 of the paper: log₁₀ |mean(w⁰)| of every weight vector of ResNet-50.

    The weights are sampled in the shapes of the layers, so no network is built. The paper's figure shows Kaiming
    initialization and pretrained weights; this one shows the two initializations of section 4.1, without pretrained
    weights, which would have to be downloaded.
    """
    shapes = list(_resnet50_shapes())
    found, rows = {}, []
    for index, scheme in enumerate(study.track(_SCHEMES, len(_SCHEMES))):
        found[scheme] = sampled_means(shapes, scheme, study.seed + index * len(shapes))
        counts, edges = torch.histogram(found[scheme]["absolute"].clamp_min(1e-12).log10(), 60)
        bins = zip(edges.tolist(), edges[1:].tolist(), counts.int().tolist(), strict=False)
        rows += [(scheme, *numbers) for numbers in bins]
    return Figure(
        f"ResNet-50: the means of its {sum(shape[0] for shape in shapes):,} weight vectors before training",
        lambda theme: _draw(found, theme),
        ("scheme", "log10_mean_from", "log10_mean_to", "count"),
        rows,
    )


def _resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """The shapes of ResNet-50's convolutions and of its linear layer (He et al. 2016)."""
    yield 64, 3, 7, 7
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            if block == 0:
                yield 4 * width, channels, 1, 1
            channels = 4 * width
    yield 1000, 2048


def _draw(found: dict[str, dict[str, Tensor]], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 3.6)
        left, right = figure.subplots(1, 2)
        for (scheme, means), arm in zip(found.items(), ("gradient", "update"), strict=True):
            color, logs = theme.arms[arm], means["absolute"].clamp_min(1e-8).log10().numpy()
            label = f"{_SCHEMES[scheme]}, median {float(means['absolute'].median()):.1e}"
            left.hist(logs, bins=80, histtype="stepfilled", alpha=0.35, color=color, lw=0)
            left.hist(logs, bins=80, histtype="step", color=color, lw=1.5, label=label)
            right.hist(means["relative"].numpy(), bins=60, range=(0, 4), histtype="step", color=color, density=True)
        at = torch.linspace(0, 4, 200)
        density = (2 / torch.pi) ** 0.5 * torch.exp(-at.square() / 2)
        right.plot(at.numpy(), density.numpy(), color=theme.text, lw=1.2, ls=":")
        left.set_xlabel("log₁₀ |mean(w⁰)|")
        left.set_ylabel("weight vectors")
        left.legend(frameon=False, loc="upper left", fontsize=9)
        left.set_xlim(left=-7)
        right.set_xlabel("|mean(w⁰)| in units of σ/√M    (dotted: half-normal density)")
        right.set_ylabel("density")
        return figure
