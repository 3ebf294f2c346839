"""A record of `Monitor` at one step, its JSON form, and the plot of a run's records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradcentral.extras import optional
from gradcentral.plotting import LIGHT, Theme, new_figure, style

__all__ = ["NET", "Reading", "Record", "plot_records", "rounded"]

_MAX_NAMES = 40
_GRADIENT_PANELS = (
    ("norm", "Gradient norm", "L2 norm, whole net"),
    ("largest", "Largest entry of the gradient", "absolute value"),
)
_WEIGHT_PANELS = (
    ("drift", "Drift  ‖eᵀ(w − w⁰)‖", "L2 norm", "whole net", "largest weight vector"),
    ("sensitivity", "Sensitivity  |1ᵀw|", "per output unit", "root mean square", "largest"),
)
NET = "(net)"  # in place of a parameter's name


@dataclass(frozen=True)
class Reading:
    """Measurements of one parameter, or of the whole net; None if there is no finite value.

    Attributes:
        share: fraction of the gradient's energy that centering removes, between 0 and 1.
        norm, centered_norm: L2 norm of the gradient g and of Φ(g).
        largest, centered_largest: largest absolute entry of g and of Φ(g).
        drift, largest_drift: ‖eᵀ(w − w⁰)‖ over all weight vectors together (L2), and the largest of a single one.
        sensitivity, largest_sensitivity: root mean square and maximum of ``|1ᵀw|`` over the output units: how much a
            unit's output changes when each of its inputs increases by 1.
    """

    share: float | None = None
    norm: float | None = None
    centered_norm: float | None = None
    largest: float | None = None
    centered_largest: float | None = None
    drift: float | None = None
    largest_drift: float | None = None
    sensitivity: float | None = None
    largest_sensitivity: float | None = None

    def __post_init__(self) -> None:
        # JSON has no NaN.
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)


@dataclass(frozen=True)
class Record:
    """The effect that GC had, or would have had, at one step.

    Attributes:
        step: number of steps taken before; gradient and weights are those that this step started from.
        placement: placement of the GC that is attached to the optimizer. None if none is attached or it is paused;
            then the values of Φ(g) are hypothetical.
        skipped: whether a GradScaler made a fused optimizer skip the step because the gradient was not finite. (A
            GradScaler does not call ``step()`` of other optimizers then, so those steps are not counted or recorded.)
        net: the whole net; its gradient includes the parameters that are not centered.
        layers: {name: reading} of the centered parameters.
        name: name of the monitor; None if it has none.
    """

    step: int
    placement: str | None
    skipped: bool
    net: Reading
    layers: Mapping[str, Reading]
    name: str | None = None

    def scalars(self) -> dict[str, float]:
        """Return the measurements as {tag: number}, for a logger: ``gc/share`` and ``gc_share/features.0.weight``.

        The name of the monitor comes first: ``generator/gc/share``. Measurements without a finite value are left out.

        Examples:
            >>> Record(0, None, False, Reading(norm=2.0), {"weight": Reading(share=0.5)}).scalars()
            {'gc/norm': 2.0, 'gc_share/weight': 0.5}
        """
        values = {f"gc/{reading}": value for reading, value in vars(self.net).items()}
        for parameter, layer in self.layers.items():
            values |= {f"gc_{reading}/{parameter}": value for reading, value in vars(layer).items()}
        prefix = "" if self.name is None else f"{self.name}/"
        return {f"{prefix}{tag}": value for tag, value in values.items() if value is not None}

    def to_line(self) -> str:
        """Format the record as one line of JSON, with six significant digits."""
        return json.dumps(asdict(self, dict_factory=rounded), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Parse the output of `to_line`."""
        values = json.loads(line)
        readings = {name: Reading(**reading) for name, reading in values.pop("layers").items()}
        return cls(net=Reading(**values.pop("net")), layers=readings, **values)


def rounded(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Round floats to six significant digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in items}


def plot_records(records: Sequence[Record], theme: Theme = LIGHT) -> Any:
    """Draw a monitor's records: gradient, drift and sensitivity of the whole net, and the share of each layer.

    Args:
        records: records of `Monitor`, in memory or read from a file.
        theme: colors.

    Returns:
        A ``matplotlib.figure.Figure``. Show it in a notebook, or ``figure.savefig("gc.png")``.

    Raises:
        ValueError: there are no records, or they are of several monitors.
        MissingExtraError: matplotlib is not installed.

    Examples:
        >>> figure = plot_records([Record(0, None, False, Reading(norm=2.0), {"weight": Reading(share=0.5)})])
        >>> figure.axes[0].get_title("left")
        'Gradient norm'
    """
    if not records:
        raise ValueError("records: empty; the first record is created at the first step")
    if len(monitors := list(dict.fromkeys(record.name for record in records))) > 1:
        raise ValueError(
            f"records: of several monitors, {', '.join(map(repr, monitors))}; plot those of one: "
            f"[record for record in records if record.name == {monitors[0]!r}]"
        )
    names = list(dict.fromkeys(name for record in records for name in record.layers))
    placements = " / ".join(dict.fromkeys(record.placement for record in records if record.placement))
    after_label = f"after centering ({placements})" if placements else "if it were centered"
    before, after = ("--", theme.arms["none"], "before centering"), ("-", theme.arms["gradient"], after_label)
    with style(theme):
        shares_height = 0.8 + 0.2 * min(len(names), _MAX_NAMES)
        figure = new_figure(10, 6 + shares_height)
        top, bottom = figure.subfigures(2, 1, height_ratios=[6, shares_height])
        above, below = top.subplots(2, 2, sharex=True)
        for axis, (name, title, unit) in zip(above, _GRADIENT_PANELS, strict=True):
            _plot_net(axis, records, title, unit, {name: before, f"centered_{name}": after})
            if any(value > 0 for value in axis.lines[0].get_ydata()):
                axis.set_yscale("log")
        top.legend(*above[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        for axis, (name, title, unit, total, largest) in zip(below, _WEIGHT_PANELS, strict=True):
            lines = {f"largest_{name}": (":", theme.arms["update"], largest), name: ("-", theme.arms["update"], total)}
            _plot_net(axis, records, title, unit, lines)
            axis.set_ylim(0, max(axis.get_ylim()[1], 1e-4))  # drift due to rounding alone stays near the axis
            axis.set_xlabel("steps taken")
            axis.legend(frameon=False)
        if names:
            _plot_shares(bottom, records, names, theme)
        return figure


def _plot_net(axis: Any, records: Sequence[Record], title: str, unit: str, lines: Mapping[str, Sequence[str]]) -> None:
    """Draw measurements of the whole net; ``lines`` gives the line style, color and label of each."""
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_ylabel(unit)
    for name, (line, color, label) in lines.items():
        values = _values([record.net for record in records], name)
        axis.plot([record.step for record in records], values, line, color=color, lw=1.3, label=label)


def _plot_shares(figure: Any, records: Sequence[Record], names: list[str], theme: Theme) -> None:
    """Draw one row per layer, in the model's order, and one cell per record."""
    # From a color near the background to that of GC, which also works where a page inverts the lightness of pictures.
    low, high = theme.faint, theme.arms["gradient"]
    colors = optional("matplotlib.colors").LinearSegmentedColormap.from_list("share", [low, high])
    axis = figure.subplots()
    rows = [_values([record.layers.get(name, Reading()) for record in records], "share") for name in names]
    steps = [record.step for record in records]
    # A cell extends from its record to the next one.
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    image = axis.pcolormesh(edges, range(len(names) + 1), rows, cmap=colors, vmin=0, vmax=1, rasterized=True)
    every = math.ceil(len(names) / _MAX_NAMES)
    axis.set_yticks([at + 0.5 for at in range(0, len(names), every)], names[::every], fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set_title("Share of each gradient's energy that centering removes", loc="left", fontweight="bold")
    axis.set_xlabel("steps taken")
    percent = optional("matplotlib.ticker").PercentFormatter(1)
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=4 + 2 * min(len(names), _MAX_NAMES), format=percent)
    bar.outline.set_visible(False)


def _values(readings: Sequence[Reading], name: str) -> list[float]:
    """Return a measurement of each reading, or NaN, which leaves a gap in the plot."""
    return [math.nan if (value := getattr(reading, name)) is None else value for reading in readings]
