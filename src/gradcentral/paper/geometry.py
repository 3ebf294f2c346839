"""One neuron's way through weight space, with and without GC, and the hyperplane that GC keeps it on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradcentral.experiment.arms import ARMS, NONE
from gradcentral.paper.figure import Figure
from gradcentral.paper.rows import as_rows
from gradcentral.paper.study import Study, gradient_of
from gradcentral.plotting import STYLES, Theme, new_figure, style

__all__ = ["geometry"]


def geometry(study: Study) -> Figure:
    """Figure 2 of the paper, of a real neuron of the largest linear layer.

    Of its neurons it is the one whose first gradient has the largest mean.
    """
    name = study.examples[-1].name
    ways: dict[str, Tensor] = {}
    unit = -1
    for arm in ARMS:
        rows = []
        for moment in study.track(study.train(arm, study.seed), study.steps):
            parameter = moment.model.get_parameter(name)
            vectors = moment.layout[parameter]
            if unit < 0:
                # GC changes its way most, at least at the start.
                unit = int(as_rows(gradient_of(parameter), vectors).mean(1).abs().argmax())
            rows.append(as_rows(parameter.detach(), vectors)[unit].cpu().double().clone())
        ways[arm] = torch.stack(rows) - rows[0]
    fan_in = ways[NONE].shape[1]
    e = torch.full((fan_in,), 1 / math.sqrt(fan_in), dtype=torch.float64)
    within = torch.cat([way - (way @ e)[:, None] * e for way in ways.values()])
    # The two directions of the hyperplane in which the ways spread most.
    _, _, directions = torch.linalg.svd(within, full_matrices=False)
    axes = torch.stack([directions[0], directions[min(1, len(directions) - 1)], e])
    points = {arm: way @ axes.T for arm, way in ways.items()}
    title = f"{study.task.name}, {study.optimizer}: neuron {unit} of {name} ({fan_in} weights) in {study.steps} steps"
    return Figure(
        title,
        lambda theme: _draw(points, theme),
        ("arm", "step", "within_1", "within_2", "along_e"),
        [(arm, step, *row) for arm, way in points.items() for step, row in enumerate(way.tolist())],
    )


def _draw(points: dict[str, Tensor], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 4.6)
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
        space = figure.add_subplot(grid[0], projection="3d", computed_zorder=False)
        beside = figure.add_subplot(grid[1])
        every = torch.cat(list(points.values()))
        low, high = every.min(0).values, every.max(0).values
        pad = 0.15 * (high - low).clamp_min(1e-12)
        (x0, y0, _), (x1, y1, _) = (low - pad).tolist(), (high + pad).tolist()
        corners = torch.tensor([[[x0, x1], [x0, x1]], [[y0, y0], [y1, y1]], [[0.0, 0.0], [0.0, 0.0]]]).numpy()
        space.plot_surface(*corners, color=theme.faint, alpha=0.55, zorder=0, shade=False)
        for arm, way in points.items():
            x, y, z = way.T.tolist()
            space.plot(x, y, z, STYLES[arm], color=theme.arms[arm], lw=1.4, zorder=2, label=arm)
            space.plot(x[-1:], y[-1:], z[-1:], "o", color=theme.arms[arm], ms=6, zorder=3)
            beside.plot(range(len(z)), z, STYLES[arm], color=theme.arms[arm], lw=1.4, label=arm)
        space.plot([0], [0], [0], "s", color=theme.text, ms=6, zorder=4)
        space.text(0, 0, 0, " w⁰", zorder=5, color=theme.text)
        space.set_xlabel("within, 1st direction", labelpad=2)
        space.set_ylabel("within, 2nd direction", labelpad=2)
        space.tick_params(labelsize=8, pad=0)
        space.view_init(elev=18, azim=-55)
        space.set_box_aspect((1.2, 1.2, 0.9), zoom=1.05)
        space.set_title("plane: eᵀ(w − w⁰) = 0; height: distance from it", loc="left")
        for axis in (space.xaxis, space.yaxis, space.zaxis):
            axis.set_pane_color((0, 0, 0, 0))
            axis._axinfo["grid"]["color"] = theme.faint
        beside.set_xlabel("step")
        beside.set_ylabel("eᵀ(w − w⁰)")
        beside.set_title("distance from the hyperplane", loc="left")
        beside.legend(frameon=False)
        return figure
