"""What Φ does to the gradients of a convolution and of a linear layer, as matrices before and after."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.paper.figure import Figure
from gradcentral.paper.rows import as_rows
from gradcentral.paper.study import Study, gradient_of, kind_of
from gradcentral.plotting import Theme, new_figure, style
from gradcentral.projection import center

__all__ = ["operation"]

# More rows or columns than this can't be told apart at the size of a page.
_UNITS, _WEIGHTS = 24, 72


class _Pair(NamedTuple):
    label: str
    before: Tensor
    after: Tensor
    means: Tensor


def operation(study: Study) -> Figure:
    """Figure 1 of the paper, with real gradients: those of the first step of training."""
    pairs = []
    (moment,) = study.track(itertools.islice(study.train("none", study.seed), 1), 1)
    for entry in study.examples:
        parameter = moment.model.get_parameter(entry.name)
        vectors = moment.layout[parameter]
        g = gradient_of(parameter).cpu()
        rows = as_rows(g, vectors)
        # The units with the longest gradients, in the layer's order: many others would be blank.
        units = rows.norm(dim=1).topk(min(_UNITS, vectors.count)).indices.sort().values
        shown = min(_WEIGHTS, vectors.fan_in)
        pairs.append(
            _Pair(
                f"{kind_of(entry)} {entry.name}: {len(units)} of {vectors.count} units, "
                f"{shown} of {vectors.fan_in} weights",
                rows[units, :shown],
                as_rows(center(g, vectors), vectors)[units, :shown],
                rows[units].mean(1),
            )
        )
    return Figure(
        f"{study.task.name}: what centering does to the gradient of each weight vector",
        lambda theme: _draw(pairs, theme),
        ("layer", "unit_row", "weight", "gradient", "centered"),
        [
            (
                pair.label.partition(":")[0],
                unit,
                weight,
                float(pair.before[unit, weight]),
                float(pair.after[unit, weight]),
            )
            for pair in pairs
            for unit in range(len(pair.before))
            for weight in range(pair.before.shape[1])
        ],
    )


def _draw(pairs: list[_Pair], theme: Theme) -> Any:
    with style(theme):
        figure = new_figure(9.8, 0.4 + 2.9 * len(pairs))
        for part, pair in zip(figure.subfigures(len(pairs), 1, squeeze=False).flat, pairs, strict=True):
            part.set_facecolor("none")
            part.suptitle(pair.label, x=0.01, ha="left", fontsize=10)
            before, after, bar, means = part.subplots(1, 4, width_ratios=[10, 10, 0.4, 3.2])
            both = torch.cat([pair.before, pair.after]).abs()
            # A few extreme entries would leave all others pale.
            reach = float(both.quantile(0.995)) or float(both.max()) or 1.0
            power = math.floor(math.log10(reach))
            limits = {"vmin": -reach / 10**power, "vmax": reach / 10**power}
            for axis, matrix, title in ((before, pair.before, "∇L"), (after, pair.after, "Φ(∇L) = P∇L")):
                scaled = (matrix / 10**power).tolist()
                image = axis.imshow(scaled, cmap="RdBu_r", aspect="auto", interpolation="none", **limits)
                axis.grid(visible=False)
                axis.set_title(title, loc="left")
                axis.set_xlabel("weight")
            before.set_ylabel("output unit")
            after.set_yticks([])
            part.colorbar(image, cax=bar).outline.set_visible(False)
            bar.set_title(f"10{_raised(power)}", fontsize=9)
            power = math.floor(math.log10(float(pair.means.abs().max()) or 1.0))
            means.barh(range(len(pair.means)), (pair.means / 10**power).tolist(), color=theme.arms["none"], height=0.8)
            means.axvline(0, color=theme.arms["gradient"], lw=2.5)
            means.set_ylim(len(pair.means) - 0.5, -0.5)
            means.set_yticks([])
            means.set_title(f"means, 10{_raised(power)}", loc="left")
            means.set_xlabel("gray ∇L, blue Φ(∇L)", fontsize=9)
        return figure


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
