"""One neuron's trajectory in weight space, and the hyperplane on which GC keeps it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradcentral.experiment.arms import ARMS
from gradcentral.paper.figure import Figure
from gradcentral.paper.rows import as_rows
from gradcentral.paper.study import Study, gradient_of
from gradcentral.plotting import STYLES, Theme, new_figure, style

__all__ = ["geometry_figure"]


def geometry_figure(study: Study) -> Figure:
    """Figure 2 of the paper, for a real neuron of the largest linear layer.

    It is the neuron whose first gradient has the largest mean, so the one that GC changes most in the first step.
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
    points = {arm: change @ axes.T for arm, change in changes.items()}
    return Figure(
        f"{study.task.name}, {study.optimizer}: neuron {unit} of {name} ({fan_in} weights) in {study.steps} steps",
        lambda theme: _draw(points, theme),
        ("arm", "step", "within_1", "within_2", "along_e"),
        [(arm, step, *point) for arm, path in points.items() for step, point in enumerate(path.tolist())],
    )


def _draw(points: dict[str, Tensor], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 4.6)
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
        space = figure.add_subplot(grid[0], projection="3d", computed_zorder=False)
        distance = figure.add_subplot(grid[1])
        every = torch.cat(list(points.values()))
        low, high = every.min(0).values, every.max(0).values
        pad = 0.15 * (high - low).clamp_min(1e-12)
        (x0, y0, _), (x1, y1, _) = (low - pad).tolist(), (high + pad).tolist()
        corners = torch.tensor([[[x0, x1], [x0, x1]], [[y0, y0], [y1, y1]], [[0.0, 0.0], [0.0, 0.0]]]).numpy()
        space.plot_surface(*corners, color=theme.faint, alpha=0.55, zorder=0, shade=False)
        for arm, path in points.items():
            x, y, z = path.T.tolist()
            space.plot(x, y, z, STYLES[arm], color=theme.arms[arm], lw=1.4, zorder=2)
            space.plot(x[-1:], y[-1:], z[-1:], "o", color=theme.arms[arm], ms=6, zorder=3)
            distance.plot(range(len(z)), z, STYLES[arm], color=theme.arms[arm], lw=1.4, label=arm)
        space.plot([0], [0], [0], "s", color=theme.text, ms=6, zorder=4)
        space.text(0, 0, 0, " w⁰", zorder=5, color=theme.text)
        space.set_xlabel("1st direction in the plane", labelpad=2)
        space.set_ylabel("2nd direction in the plane", labelpad=2)
        space.tick_params(labelsize=8, pad=0)
        space.view_init(elev=18, azim=-55)
        space.set_box_aspect((1.2, 1.2, 0.9), zoom=1.05)
        space.set_title("gray: the hyperplane eᵀ(w − w⁰) = 0; height: eᵀ(w − w⁰)", loc="left", fontsize=10)
        for axis in (space.xaxis, space.yaxis, space.zaxis):
            axis.set_pane_color((0, 0, 0, 0))
            axis._axinfo["grid"]["color"] = theme.faint
        distance.set_xlabel("step")
        distance.set_ylabel("eᵀ(w − w⁰)")
        distance.set_title("distance from the hyperplane", loc="left", fontsize=10)
        distance.legend(frameon=False)
        return figure
