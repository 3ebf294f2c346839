"""How far the means of ResNet-50's initial weight vectors are from zero."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from gradcentral.bench.shapes import resnet50
from gradcentral.initialization import initial_means
from gradcentral.paper.figure import Figure
from gradcentral.paper.study import Study
from gradcentral.plotting import Theme, new_figure, style

__all__ = ["initial_weight_means"]

_SCHEMES = {"xavier_normal": "Xavier", "kaiming_normal": "Kaiming"}


def initial_weight_means(study: Study) -> Figure:
    """Figure 3 of the paper: log₁₀ |mean(w⁰)| for every weight vector of ResNet-50, drawn by its shapes alone."""
    shapes = [shape for shape, vectors in resnet50() if vectors is not None]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    seeds = itertools.count(study.seed)
    for scheme in study.track(_SCHEMES, len(_SCHEMES)):
        # A seed for each layer, or those of one shape would get the same weights.
        drawn = [initial_means(shape, scheme, seed=next(seeds)) for shape in shapes]
        means = torch.cat([layer.absolute for layer in drawn])
        relative = torch.cat([layer.absolute / layer.expected for layer in drawn])
        found[scheme] = means, relative
    count = len(next(iter(found.values()))[0])
    rows = []
    for scheme, (means, _) in found.items():
        counts, edges = torch.histogram(means.clamp_min(1e-12).log10(), 60)
        rows += [
            (scheme, float(low), float(high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)
        ]
    return Figure(
        f"ResNet-50, {count:,} weight vectors: their means before training are near zero",
        lambda theme: _draw(found, theme),
        ("scheme", "log10_mean_from", "log10_mean_to", "count"),
        rows,
    )


def _draw(found: dict[str, tuple[Tensor, Tensor]], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 3.6)
        left, right = figure.subplots(1, 2)
        colors = (theme.arms["gradient"], theme.arms["update"])
        for (scheme, (means, relative)), color in zip(found.items(), colors, strict=False):
            label = f"{_SCHEMES[scheme]}, median {float(means.median()):.1e}"
            left.hist(
                means.clamp_min(1e-8).log10().numpy(), bins=80, histtype="stepfilled", alpha=0.35, color=color, lw=0
            )
            left.hist(means.clamp_min(1e-8).log10().numpy(), bins=80, histtype="step", color=color, lw=1.5, label=label)
            right.hist(relative.numpy(), bins=60, range=(0, 4), histtype="step", color=color, density=True, lw=1.5)
        at = torch.linspace(0, 4, 200)
        density = (2 / torch.pi) ** 0.5 * torch.exp(-at.square() / 2)
        right.plot(at.numpy(), density.numpy(), color=theme.text, lw=1.2, ls=":")
        left.set_xlabel("log₁₀ |mean(w⁰)|")
        left.set_ylabel("weight vectors")
        left.legend(frameon=False, loc="upper left", fontsize=9)
        left.set_xlim(left=-7)
        right.set_xlabel("|mean(w⁰)| in units of σ/√M    (dotted: what theory says)")
        right.set_ylabel("density")
        return figure
