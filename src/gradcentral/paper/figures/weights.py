"""Figures of the weights: one neuron's trajectory, and the means of initial weight vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradcentral.experiment.arms import ARMS
from gradcentral.paper.figure import Figure, drawing, plot_arm
from gradcentral.paper.gradients import as_rows
from gradcentral.paper.initial_weights import sampled_means
from gradcentral.paper.study import Study, gradient_of
from gradcentral.plotting import LIGHT

__all__ = ["geometry_figure", "initial_means_figure"]


def geometry_figure(study: Study) -> Figure:
    """Figure 2 of the paper: the trajectory of a real neuron, and the hyperplane on which GC keeps it.

    It is the neuron of the largest linear layer whose first gradient has the largest mean: GC changes its first step
    most.
    """
    name = study.example_layers[-1].name
    changes: dict[str, Tensor] = {}
    unit = -1
    for arm in ARMS:
        weights = []
        for step in study.train(arm, study.seed):
            parameter = step.model.get_parameter(name)
            vectors = step.layout[parameter]
            if unit < 0:
                unit = int(as_rows(gradient_of(parameter), vectors).mean(1).abs().argmax())
            weights.append(as_rows(parameter.detach(), vectors)[unit].cpu().double().clone())
        changes[arm] = torch.stack(weights) - weights[0]
    fan_in = len(weights[0])
    e = torch.full((fan_in,), 1 / math.sqrt(fan_in), dtype=torch.float64)
    within = torch.cat([change - torch.outer(change @ e, e) for change in changes.values()])
    # The axes are the two directions within the hyperplane in which the trajectories spread most, and e.
    directions = torch.linalg.svd(within, full_matrices=False).Vh
    axes = torch.stack([directions[0], directions[min(1, len(directions) - 1)], e])
    paths = {arm: (change @ axes.T).tolist() for arm, change in changes.items()}
    title = f"{study.task.name}, {study.optimizer}: neuron {unit} of {name} ({fan_in} weights) in {study.steps} steps"
    rows = [(arm, step, *point) for arm, path in paths.items() for step, point in enumerate(path)]
    return Figure(title, _draw_paths(paths), ("arm", "step", "within_1", "within_2", "along_e"), rows)


def _draw_paths(paths: dict[str, list[list[float]]]) -> Any:
    with drawing(4.6) as image:
        grid = image.add_gridspec(1, 2, width_ratios=[1.25, 1])
        space = image.add_subplot(grid[0], projection="3d", computed_zorder=False)
        distance = image.add_subplot(grid[1])
        every = torch.tensor([point for path in paths.values() for point in path], dtype=torch.float64)
        low, high = every.min(0).values, every.max(0).values
        pad = 0.15 * (high - low).clamp_min(1e-12)
        (x0, y0, _), (x1, y1, _) = (low - pad).tolist(), (high + pad).tolist()
        corners = torch.tensor([[[x0, x1], [x0, x1]], [[y0, y0], [y1, y1]], [[0.0, 0.0], [0.0, 0.0]]]).numpy()
        space.plot_surface(*corners, color=LIGHT.faint, alpha=0.55, zorder=0, shade=False)
        for arm, path in paths.items():
            x, y, z = zip(*path, strict=True)
            plot_arm(space, arm, x, y, z, lw=1.4, zorder=2)
            space.plot(x[-1:], y[-1:], z[-1:], "o", color=LIGHT.arms[arm], ms=6, zorder=3)
            plot_arm(distance, arm, range(len(z)), z, lw=1.4, label=arm)
        space.plot([0], [0], [0], "s", color=LIGHT.text, ms=6, zorder=4)
        space.text(0, 0, 0, " w⁰", zorder=5, color=LIGHT.text)
        space.set_xlabel("1st direction in the plane", labelpad=2)
        space.set_ylabel("2nd direction in the plane", labelpad=2)
        space.tick_params(labelsize=8, pad=0)
        space.view_init(elev=18, azim=-55)
        space.set_box_aspect((1.2, 1.2, 0.9), zoom=1.05)
        space.set_title("gray: the hyperplane eᵀ(w − w⁰) = 0; height: eᵀ(w − w⁰)", loc="left", fontsize=10)
        for axis in (space.xaxis, space.yaxis, space.zaxis):
            axis.set_pane_color((0, 0, 0, 0))
            axis._axinfo["grid"]["color"] = LIGHT.faint
        distance.set(xlabel="step", ylabel="eᵀ(w − w⁰)")
        distance.set_title("distance from the hyperplane", loc="left", fontsize=10)
        distance.legend(frameon=False)
    return image


def initial_means_figure(study: Study) -> Figure:
    """Figure 3 of the paper: log₁₀ |mean(w⁰)| of every weight vector of ResNet-50.

    The weights are sampled in the shapes of the layers, so no network is built. The paper's figure shows Kaiming
    initialization and pretrained weights; this one shows the two initializations of section 4.1, without pretrained
    weights, which would have to be downloaded.
    """
    shapes, rows = list(_resnet50_shapes()), []
    with drawing(3.6) as image:
        logs, units = image.subplots(1, 2)
        schemes = (("xavier_normal", "Xavier", "gradient"), ("kaiming_normal", "Kaiming", "update"))
        for index, (scheme, name, arm) in enumerate(study.track(schemes, len(schemes))):
            means, color = sampled_means(shapes, scheme, study.seed + index * len(shapes)), LIGHT.arms[arm]
            absolute = means["absolute"]
            counts, edges = torch.histogram(absolute.clamp_min(1e-12).log10(), 60)
            bins = zip(edges.tolist(), edges[1:].tolist(), counts.int().tolist(), strict=False)
            rows += [(scheme, *numbers) for numbers in bins]
            shown, label = absolute.clamp_min(1e-8).log10().numpy(), f"{name}, median {float(absolute.median()):.1e}"
            logs.hist(shown, bins=80, histtype="stepfilled", alpha=0.35, color=color, lw=0)
            logs.hist(shown, bins=80, histtype="step", color=color, lw=1.5, label=label)
            units.hist(means["relative"].numpy(), bins=60, range=(0, 4), histtype="step", color=color, density=True)
        at = torch.linspace(0, 4, 200)
        density = (2 / torch.pi) ** 0.5 * torch.exp(-at.square() / 2)
        units.plot(at.numpy(), density.numpy(), color=LIGHT.text, lw=1.2, ls=":")
        units.set(xlabel="|mean(w⁰)| in units of σ/√M    (dotted: half-normal density)", ylabel="density")
        logs.set(xlabel="log₁₀ |mean(w⁰)|", ylabel="weight vectors")
        logs.legend(frameon=False, loc="upper left", fontsize=9)
        logs.set_xlim(left=-7)
    title = f"ResNet-50: the means of its {sum(shape[0] for shape in shapes):,} weight vectors before training"
    return Figure(title, image, ("scheme", "log10_mean_from", "log10_mean_to", "count"), rows)


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
