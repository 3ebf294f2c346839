"""The figures that train no network: of its first gradients, of its initial weights, and of trained ones in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcentral.experiment.arms import NONE
from gradcentral.experiment.probing import probe_task
from gradcentral.layout import weight_layout
from gradcentral.paper.gradients import as_rows
from gradcentral.paper.initial_weights import sampled_means
from gradcentral.paper.study import Figure, Study, drawing, gradient_of, layer_label
from gradcentral.paper.trained_weights import means_of
from gradcentral.plotting import LIGHT
from gradcentral.projection import center

__all__ = ["initial_means_figure", "operation_figure", "shares_figure"]

# More rows or columns than this cannot be distinguished at the size of a page.
_UNITS, _WEIGHTS = 24, 72


def operation_figure(study: Study) -> Figure:
    """Draw figure 1 of the paper: the gradients of the first training step as matrices, before and after centering."""
    (step,) = study.train(NONE, study.seeds[0], steps=1)
    layers, numbers = study.example_layers, []
    with drawing(0.4 + 2.9 * len(layers)) as image:
        for entry, panel in zip(layers, image.subfigures(len(layers), 1, squeeze=False).flat, strict=True):
            parameter = step.model.get_parameter(entry.name)
            g, vectors, label = gradient_of(parameter).cpu(), step.layout[parameter], layer_label(entry)
            rows, centered = as_rows(g, vectors), as_rows(center(g, vectors), vectors)
            # Show the units with the longest gradients, in the layer's order: many of the others would be blank.
            units = rows.norm(dim=1).topk(min(_UNITS, vectors.count)).indices.sort().values
            shown = min(_WEIGHTS, vectors.fan_in)
            before, after = rows[units, :shown], centered[units, :shown]
            part = f"{len(units)} of {vectors.count} units, {shown} of {vectors.fan_in} weights"
            panel.suptitle(f"{label}: {part}", x=0.01, ha="left", fontsize=10)
            _draw_operation(panel, before, after, rows[units].mean(1).tolist())
            pairs = enumerate(torch.stack([before, after], dim=-1).tolist())
            numbers += [(label, unit, weight, *pair) for unit, row in pairs for weight, pair in enumerate(row)]
    title = f"{study.task.name}: the gradient of each weight vector before and after centering"
    return Figure(title, image, ("layer", "unit_row", "weight", "gradient", "centered"), numbers)


def _draw_operation(panel: Any, before: Tensor, after: Tensor, means: list[float]) -> None:
    panel.set_facecolor("none")
    *matrices, bar, bars = panel.subplots(1, 4, width_ratios=[10, 10, 0.4, 3.2])
    both = torch.cat([before, after]).abs()
    # If colors covered the full range, a few extreme entries would make all others pale.
    reach = float(both.quantile(0.995)) or float(both.max()) or 1.0
    for axis, matrix, title in zip(matrices, (before, after), ("∇L", "Φ(∇L) = P∇L"), strict=True):
        colors = axis.imshow(matrix.tolist(), cmap="RdBu_r", aspect="auto", interpolation="none")
        colors.set_clim(-reach, reach)
        axis.grid(visible=False)
        axis.set_title(title, loc="left")
        axis.set_xlabel("weight")
    matrices[0].set_ylabel("output unit")
    matrices[1].set_yticks([])
    panel.colorbar(colors, cax=bar).outline.set_visible(False)
    bar.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    bars.barh(range(len(means)), means, color=LIGHT.arms["none"], height=0.8)
    bars.axvline(0, color=LIGHT.arms["gradient"], lw=2.5)
    bars.set(ylim=(len(means) - 0.5, -0.5), yticks=[])
    bars.set_title("means", loc="left")
    bars.set_xlabel("gray ∇L, blue Φ(∇L)", fontsize=9, labelpad=14)
    bars.ticklabel_format(axis="x", scilimits=(0, 0), useMathText=True)


class _Means(NamedTuple):
    """The means of weight vectors of one kind."""

    name: str  # in the figure's data
    label: str
    color: str
    absolute: Tensor  # |mean(w)|
    relative: Tensor  # |mean(w)| in units of σ/√M


def initial_means_figure(study: Study) -> Figure:
    """Draw figure 3 of the paper: log₁₀ |mean(w)| of every weight vector.

    By default, the weights are sampled in the shapes of ResNet-50's layers, so no network is built. With trained
    weights, which the paper shows too, these are drawn beside the task's own network before training.
    """
    sets = _resnet50_means(study) if study.weights is None else _means_before_and_after_training(study)
    shown, rows = [], []
    for means in study.track(sets, 2):
        counts, edges = torch.histogram(means.absolute.clamp_min(1e-12).log10(), 60)
        bins = zip(edges.tolist(), edges[1:].tolist(), counts.int().tolist(), strict=False)
        rows += [(means.name, *numbers) for numbers in bins]
        shown.append(means)
    with drawing(3.6) as image:
        _draw_means(image, shown, "w⁰" if study.weights is None else "w")
    vectors = f"{len(shown[0].absolute):,} weight vectors"
    title = (
        f"ResNet-50: the means of its {vectors} before training"
        if study.weights is None
        else f"{study.task.name}: the means of its {vectors} before and after training"
    )
    return Figure(title, image, ("scheme", "log10_mean_from", "log10_mean_to", "count"), rows)


def _draw_means(image: Any, sets: Sequence[_Means], symbol: str) -> None:
    logs, units = image.subplots(1, 2)
    bins = max(12, min(80, len(sets[0].absolute) // 6))
    # The few means that are nearly zero would stretch the axis; they are counted in its first bin.
    values = torch.stack([means.absolute for means in sets]).clamp_min(1e-8).log10()
    low = float(values.quantile(0.001))
    reach = max(4.0, float(torch.cat([means.relative for means in sets]).quantile(0.99)))
    for means, logarithms in zip(sets, values.clamp_min(low).numpy(), strict=True):
        label = f"{means.label}, median {float(means.absolute.median()):.1e}"
        span: dict[str, Any] = {"bins": bins, "range": (low, float(values.max())), "color": means.color}
        logs.hist(logarithms, histtype="stepfilled", alpha=0.35, lw=0, **span)
        logs.hist(logarithms, histtype="step", lw=1.5, label=label, **span)
        span |= {"bins": min(60, bins), "range": (0, reach)}
        units.hist(means.relative.numpy(), histtype="step", density=True, **span)
    at = torch.linspace(0, reach, 200, dtype=torch.float64, device="cpu")
    density = (2 / torch.pi) ** 0.5 * torch.exp(-at.square() / 2)
    units.plot(at.numpy(), density.numpy(), color=LIGHT.text, lw=1.2, ls=":")
    units.set(xlabel=f"|mean({symbol})| in units of σ/√M    (dotted: half-normal density)", ylabel="density")
    logs.set(xlabel=f"log₁₀ |mean({symbol})|", ylabel="weight vectors")
    logs.legend(frameon=False, loc="upper left", fontsize=9)


def _resnet50_means(study: Study) -> Iterator[_Means]:
    shapes = list(_resnet50_shapes())
    schemes = (("xavier_normal", "Xavier", "gradient"), ("kaiming_normal", "Kaiming", "update"))
    for index, (scheme, name, arm) in enumerate(schemes):
        means = sampled_means(shapes, scheme, study.seeds[0] + index * len(shapes))
        yield _Means(scheme, name, LIGHT.arms[arm], **means)


def _means_before_and_after_training(study: Study) -> Iterator[_Means]:
    assert study.weights is not None
    layout = weight_layout(study.fresh_model())
    vectors = {layout.names[parameter]: found for parameter, found in layout.items()}
    before = {layout.names[parameter]: parameter for parameter in layout}
    for name, arm, weights in (("before training", "none", before), ("after training", "gradient", study.weights)):
        yield _Means(name, name, LIGHT.arms[arm], **means_of(weights, vectors))


def _resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of ResNet-50's convolutions and of its linear layer (He et al. 2016)."""
    yield 64, 3, 7, 7
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            if block == 0:
                yield 4 * width, channels, 1, 1
            channels = 4 * width
    yield 1000, 2048


def shares_figure(study: Study) -> Figure:
    """Draw the share of each layer's gradient that GC removes before training: the plot of `gradcentral.probe`."""
    (report,) = study.track((probe_task(study.task, seed=seed, device=study.device) for seed in study.seeds[:1]), 1)
    columns = ("name", "kind", "share", "spread", "finding")
    rows = [[getattr(layer, column) for column in columns] for layer in report.layers]
    return Figure(f"{study.task.name}: where GC acts before training", report.plot(LIGHT), columns, rows)
