"""Φ applied to the gradients of a convolution and of a linear layer, as matrices before and after."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.experiment.arms import NONE
from gradcentral.paper.figure import Figure
from gradcentral.paper.rows import as_rows
from gradcentral.paper.study import Study, gradient_of, layer_label
from gradcentral.plotting import Theme, new_figure, style
from gradcentral.projection import center

__all__ = ["operation_figure"]

# More rows or columns than this cannot be distinguished at the size of a page.
_UNITS, _WEIGHTS = 24, 72


class _Panel(NamedTuple):
    """A part of one layer's gradient before and after centering, and the means of its units."""

    layer: str
    part: str
    before: Tensor
    after: Tensor
    means: Tensor


def operation_figure(study: Study) -> Figure:
    """Figure 1 of the paper, with the real gradients of the first training step."""
    panels = []
    (step,) = study.train(NONE, study.seed, steps=1)
    for entry in study.example_layers:
        parameter = step.model.get_parameter(entry.name)
        vectors = step.layout[parameter]
        g = gradient_of(parameter).cpu()
        rows, centered = as_rows(g, vectors), as_rows(center(g, vectors), vectors)
        # The units with the longest gradients, in the layer's order: many of the others would be blank.
        units = rows.norm(dim=1).topk(min(_UNITS, vectors.count)).indices.sort().values
        shown = min(_WEIGHTS, vectors.fan_in)
        part = f"{len(units)} of {vectors.count} units, {shown} of {vectors.fan_in} weights"
        before, after = rows[units, :shown], centered[units, :shown]
        panels.append(_Panel(layer_label(entry), part, before, after, rows[units].mean(1)))
    return Figure(
        f"{study.task.name}: the gradient of each weight vector before and after centering",
        lambda theme: _draw(panels, theme),
        ("layer", "unit_row", "weight", "gradient", "centered"),
        [
            (panel.layer, unit, weight, *numbers)
            for panel in panels
            for unit, row in enumerate(torch.stack([panel.before, panel.after], dim=-1).tolist())
            for weight, numbers in enumerate(row)
        ],
    )


def _draw(panels: list[_Panel], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 0.4 + 2.9 * len(panels))
        for part, panel in zip(figure.subfigures(len(panels), 1, squeeze=False).flat, panels, strict=True):
            part.set_facecolor("none")
            part.suptitle(f"{panel.layer}: {panel.part}", x=0.01, ha="left", fontsize=10)
            before, after, bar, means = part.subplots(1, 4, width_ratios=[10, 10, 0.4, 3.2])
            both = torch.cat([panel.before, panel.after]).abs()
            # With the full range of colors, a few extreme entries would leave all others pale.
            reach = float(both.quantile(0.995)) or float(both.max()) or 1.0
            for axis, matrix, title in ((before, panel.before, "∇L"), (after, panel.after, "Φ(∇L) = P∇L")):
                image = axis.imshow(matrix.tolist(), cmap="RdBu_r", aspect="auto", interpolation="none")
                image.set_clim(-reach, reach)
                axis.grid(visible=False)
                axis.set_title(title, loc="left")
                axis.set_xlabel("weight")
            before.set_ylabel("output unit")
            after.set_yticks([])
            part.colorbar(image, cax=bar).outline.set_visible(False)
            bar.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
            means.barh(range(len(panel.means)), panel.means.tolist(), color=theme.arms["none"], height=0.8)
            means.axvline(0, color=theme.arms["gradient"], lw=2.5)
            means.set_ylim(len(panel.means) - 0.5, -0.5)
            means.set_yticks([])
            means.set_title("means", loc="left")
            means.set_xlabel("gray ∇L, blue Φ(∇L)", fontsize=9, labelpad=14)
            means.ticklabel_format(axis="x", scilimits=(0, 0), useMathText=True)
        return figure
