"""Draw docs/layouts/weight-vectors.png: `python docs/layouts/draw.py`.

What is blue is asked of `gradcentral.weight_layout`, so that the picture cannot say anything else than the code.
"""

from __future__ import annotations

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


class Project(nn.Module):
    """What transformers' Conv1D is: ``x @ weight``."""

    weight_vectors = {"weight": WeightVectors((0,))}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 5))


class Experts(nn.Module):
    """All experts in one tensor, in either layout."""

    def __init__(self, *shape: int, span: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.span = span

    weight_vectors = {"weight": lambda module, tensor: WeightVectors((module.span,))}  # noqa: RUF012


# Title, layer, which unit to show, names of the axes. Axes: rows, columns (of blocks), rows and columns inside a block.
PANELS: list[tuple[str, nn.Module, int, str]] = [
    ("Linear, LSTM, attention", nn.Linear(6, 5), 2, "o i"),
    ("used as x @ w: GPT-2 Conv1D", Project(), 2, "i o"),
    ("Conv2d", nn.Conv2d(3, 4, 3), 1, "o i k k"),
    ("Conv2d, two groups", nn.Conv2d(4, 4, 3, groups=2), 1, "o i/g k k"),
    ("Bilinear", nn.Bilinear(4, 3, 3), 1, "o i₁ i₂"),
    ("ConvTranspose2d", nn.ConvTranspose2d(4, 3, 3), 1, "i o k k"),
    ("ConvTranspose2d, two groups", nn.ConvTranspose2d(4, 6, 3, groups=2), 1, "i o/g k k"),
    ("experts: Mixtral, Qwen, DeepSeek …", Experts(3, 4, 5, span=2), 5, "e o i"),
    ("experts: GPT-OSS, Llama 4, Aria", Experts(3, 5, 4, span=1), 5, "e i o"),
    ("Embedding, token, scale", nn.Embedding(5, 6), 0, "v d"),
]


def chosen(layer: nn.Module, unit: int) -> tuple[Tensor, str]:
    """Which elements of the layer's weight make the unit's weight vector, and what the layout says."""
    layout = weight_layout(layer)
    parameter = layer.get_parameter("weight")
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if parameter not in layout:
        return mask, "left alone"
    vectors = layout[parameter]
    view = mask.view(vectors.dims)
    units = [axis for axis in range(view.ndim) if axis not in vectors.span]
    index: list[Any] = [slice(None)] * view.ndim
    for axis in reversed(units):
        index[axis] = unit % view.shape[axis]
        unit //= view.shape[axis]
    view[tuple(index)] = True
    axes = ", ".join(map(str, vectors.span)) + (f" of {list(vectors.view)}" if vectors.view else "")
    return mask, f"one vector runs over {'axis' if len(vectors.span) == 1 else 'axes'} {axes}"


def draw(ax: Axes, mask: Tensor, names: list[str]) -> None:
    """Matrices as grids; a third axis as blocks one below the other; a convolution as a grid of its kernels."""
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
    ax.annotate(f"{down}\n↓", (0, first_block / 2), (-11, 0), textcoords="offset points", **LABEL)
    if mask.ndim == 3:
        for row in range(rows):
            middle = row * (height + gap) + height / 2
            ax.annotate(f"{names[0]} = {row}", (right, middle), (20, 0), textcoords="offset points", **LABEL)


def main() -> None:
    """Draw all panels into one picture."""
    figure, axes = plt.subplots(2, 5, figsize=(15, 7.4), facecolor="white")
    for ax, (title, layer, unit, names) in zip(axes.flat, PANELS, strict=True):
        mask, verdict = chosen(layer, unit)
        draw(ax, mask, names.split())
        ax.set_title(f"{title}\n[{', '.join(names.split())}]", fontsize=10.5, color=TEXT, pad=20)
        ax.text(0.5, -0.03, verdict, transform=ax.transAxes, ha="center", va="top", fontsize=9, color=TEXT)
    figure.tight_layout(h_pad=3)
    figure.savefig(Path(__file__).with_name("weight-vectors.png"), dpi=110)


if __name__ == "__main__":
    main()
