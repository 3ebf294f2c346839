"""Draw docs/layouts/weight-vectors.png: ``python docs/layouts/draw.py``.

The blue elements come from `gradcentral.weight_layout`, so the picture cannot contradict the code.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from gradcentral import WeightVectors, weight_layout

BLUE, GRAY, EDGE, TEXT = "#2563eb", "#e5e7eb", "#ffffff", "#111827"
LABEL: dict[str, Any] = {"color": TEXT, "fontsize": 9, "ha": "center", "va": "center"}
AT_TOP: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}


class Weight(nn.Module):
    """A stand-in for a layer of another library: one weight with a declared pattern."""

    weight_vectors = {"weight": lambda module, tensor: module.pattern}  # noqa: RUF012

    def __init__(self, pattern: str, *shape: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.weight = nn.Parameter(torch.zeros(shape))


# Title, pattern, layer, index of the output unit to color.
PANELS: list[tuple[str, str, nn.Module, int]] = [
    ("Linear, LSTM,\nattention", "o [i]", nn.Linear(6, 5), 2),
    ("GPT-2 Conv1D:\nx @ weight", "[i] o", Weight("[i] o", 6, 5), 2),
    ("Conv2d", "o [i k k]", nn.Conv2d(3, 4, 3), 1),
    ("Conv2d,\ntwo groups", "o [i k k]", nn.Conv2d(4, 4, 3, groups=2), 1),
    ("ConvTranspose2d", "[i] o [k k]", nn.ConvTranspose2d(4, 3, 3), 1),
    ("ConvTranspose2d,\ntwo groups", "(2 [i]) o [k k]", nn.ConvTranspose2d(4, 6, 3, groups=2), 1),
    ("ConvTranspose2d,\nkernel 4, stride 2", "[i] o ([m] 2) ([m] 2)", nn.ConvTranspose2d(3, 3, 4, stride=2), 5),
    ("experts: Mixtral,\nQwen, DeepSeek …", "e o [i]", Weight("e o [i]", 3, 4, 5), 5),
    ("experts: GPT-OSS,\nLlama 4, Aria", "e [i] o", Weight("e [i] o", 3, 5, 4), 5),
    ("Embedding,\ntoken, scale", "v d", nn.Embedding(5, 6), 0),
]


def weight_vector(layer: nn.Module, pattern: str, unit: int) -> tuple[Tensor, str]:
    """Return a mask of the elements that form one unit's weight vector, and a caption for the panel."""
    layout = weight_layout(layer)
    parameter = layer.get_parameter("weight")
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if parameter not in layout:
        return mask, "skipped:\nno output units"
    vectors = layout[parameter]
    assert vectors.agrees_with(WeightVectors.parse(pattern, parameter.shape)), f"{layer} is not {pattern!r}"
    view = mask.view(vectors.dims)
    units = [axis for axis in range(view.ndim) if axis not in vectors.span]
    index: list[Any] = [slice(None)] * view.ndim
    for axis in reversed(units):
        index[axis] = unit % view.shape[axis]
        unit //= view.shape[axis]
    view[tuple(index)] = True
    return mask, f"{vectors.count} weight vectors\nof {vectors.fan_in} elements"


def axis_names(pattern: str) -> list[str]:
    """Return the names of the parameter's own axes: ``2 i``, ``o``, ``k`` and ``k`` for ``"(2 [i]) o [k k]"``."""
    return [group or name for group, name in re.findall(r"\((.*?)\)|(\w+)", pattern.replace("[", "").replace("]", ""))]


def draw(ax: Axes, mask: Tensor, names: list[str]) -> None:
    """Draw a matrix as a grid, the third axis of experts as stacked blocks, and a convolution as a grid of kernels."""
    blocks = mask if mask.ndim == 4 else mask[None, None] if mask.ndim == 2 else mask[:, None]
    rows, columns, height, width = blocks.shape
    gap = 0.6 if mask.ndim > 2 else 0.0
    for row, column, y, x in product(range(rows), range(columns), range(height), range(width)):
        color = BLUE if blocks[row, column, y, x] else GRAY
        corner = (column * (width + gap) + x, row * (height + gap) + y)
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor=EDGE, linewidth=0.8))
    right, bottom = columns * (width + gap) - gap, rows * (height + gap) - gap
    half = max(right, bottom) / 2 + 0.2
    ax.set(xlim=(right / 2 - half, right / 2 + half), ylim=(bottom / 2 + half, bottom / 2 - half), aspect="equal")
    ax.axis("off")
    down, across = names[-2:] if mask.ndim == 3 else names[:2]
    ax.annotate(f"{across} →", (right / 2, 0), (0, 9), textcoords="offset points", **LABEL)
    first_block = height if mask.ndim == 3 else bottom
    ax.annotate(f"{down}\n↓", (0, first_block / 2), (-13, 0), textcoords="offset points", **LABEL)
    if mask.ndim == 3:
        for row in range(rows):
            middle = row * (height + gap) + height / 2
            ax.annotate(f"{names[0]} = {row}", (right, middle), (20, 0), textcoords="offset points", **LABEL)


def main() -> None:
    """Draw all panels into one picture."""
    figure, axes = plt.subplots(2, 5, figsize=(10.5, 6.8), facecolor="white")
    for ax, (title, pattern, layer, unit) in zip(axes.flat, PANELS, strict=True):
        mask, caption = weight_vector(layer, pattern, unit)
        draw(ax, mask, axis_names(pattern))
        ax.set_title(f"{title}\n", fontsize=10.5, color=TEXT, pad=30)
        ax.annotate(pattern, (0.5, 1), (0, 25), **AT_TOP, fontsize=11, color=BLUE, family="monospace")
        ax.text(0.5, -0.03, caption, transform=ax.transAxes, ha="center", va="top", fontsize=9, color=TEXT)
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.06, top=0.83, hspace=0.85)
    figure.savefig(Path(__file__).with_name("weight-vectors.png"), dpi=160)


if __name__ == "__main__":
    main()
