"""The benchmark as a table for the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from gradcentral.bench.runs import NOISY, Benchmark, Case
from gradcentral.bench.steps import BASELINE, OURS
from gradcentral.bench.timing import Ratio

__all__ = ["markdown", "plot", "table", "verdict"]


def table(benchmark: Benchmark) -> Table:
    """One row a case, one column an alternative: its time over the baseline's, and the quartiles."""
    names = list(dict.fromkeys(name for case in benchmark.cases for name in case.ratios))
    grid = Table(title=f"time of a step ÷ {BASELINE}: median (quartiles) of paired rounds", title_justify="left")
    for heading in ("model", "type", "optimizer"):
        grid.add_column(heading, no_wrap=True)
    grid.add_column("ms", justify="right")
    for name in (*names, "ours ÷ streaming", "attaching ÷ streaming g", "attaching, µs/param", "noise"):
        grid.add_column(name, justify="right")
    for case in benchmark.cases:
        cells = [_cell(case.ratios.get(name), name == OURS) for name in names]
        grid.add_row(
            case.model,
            case.dtype,
            case.algorithm,
            f"{case.milliseconds:.2f}",
            *cells,
            _median(case.over_streaming),
            _median(case.attaching),
            "" if case.attaching_us is None else f"{case.attaching_us:.1f}",
            f"±{case.noise:.0%}",
        )
    return grid


def _cell(found: Ratio | None, ours: bool) -> Text:
    if found is None:
        return Text("–")
    style = "" if not ours else "green" if found.high < 1 else "red" if found.low > 1 else "yellow"
    return Text(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})", style=style)


def _median(found: Ratio | None) -> str:
    return "" if found is None else f"{found.median:.2f}"


def markdown(benchmark: Benchmark) -> str:
    """The medians as a table for a page."""
    columns = {
        "torch default": "torch default, no GC",
        "loop + torch fused": "loop + torch fused",
        "`centralize` + torch fused": "centralize + torch fused",
        "ours, `gradient`": OURS,
        "ours, `update`": "gradcentral update",
    }
    headings = ["model", "type", "optimizer", "torch fused, ms", *columns, "ours ÷ streaming", "noise"]
    lines = ["| " + " | ".join(headings) + " |", "|---|---|---" + "|--:" * (len(headings) - 3) + "|"]
    for case in benchmark.cases:
        ratios = [case.ratios.get(name) for name in columns.values()]
        cells = ["–" if found is None else f"{found.median:.2f}" for found in ratios]
        ours = case.ratios.get(OURS)
        if ours is not None and ours.high < 1:
            cells[3] = f"**{cells[3]}**"
        start = [case.model, case.dtype, case.algorithm, f"{case.milliseconds:.2f}"]
        lines.append(
            "| " + " | ".join([*start, *cells, _median(case.over_streaming) or "–", f"±{case.noise:.0%}"]) + " |"
        )
    return "\n".join(lines) + "\n"


def verdict(benchmark: Benchmark) -> str:
    """What the numbers allow to say of our step, and whether they allow anything."""
    if benchmark.noise > NOISY:
        return (
            f"Too noisy to tell: the same step, timed twice, differed by ±{benchmark.noise:.0%}. "
            "Close other programs and run it again."
        )
    faster = [case for case in benchmark.cases if (found := case.ratios.get(OURS)) and found.high < 1]
    slower = [case for case in benchmark.cases if (found := case.ratios.get(OURS)) and found.low > 1]
    text = (
        f"A step with GC is faster than {BASELINE} in {len(faster)} of {len(benchmark.cases)} cases, slower in "
        f"{len(slower)}, and within the quartiles in the rest (noise ±{benchmark.noise:.0%})."
    )
    if slower:
        text += " Slower: " + ", ".join(f"{_name(case)} {case.ratios[OURS].median:.2f}" for case in slower) + "."
    for case in benchmark.cases:
        if case.monitoring:
            added = ", ".join(f"{added:.2%} ({network})" for network, added in case.monitoring.items())
            text += f" Monitor adds to an iteration at its default interval: {added}."
    return text


def _name(case: Case) -> str:
    return f"{case.model} {case.dtype} {case.algorithm}"


def plot(benchmark: Benchmark, path: Path) -> None:
    """The ratios of each case as dots with their quartiles, on a logarithmic axis; left of 1 is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        OURS: ("#0072b2", "o", "gradcentral, placement gradient"),
        "gradcentral update": ("#56b4e9", "s", "gradcentral, placement update"),
        "centralize + torch fused": ("#009e73", "^", "centralize() on torch fused"),
        "loop + torch fused": ("#d55e00", "v", "the usual loop before torch fused"),
        "torch default, no GC": ("#999999", "D", "torch default, no GC"),
    }
    cases = list(reversed(benchmark.cases))
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (color, marker, label) in shown.items():
        points = [(y, case.ratios[name]) for y, case in enumerate(cases) if name in case.ratios]
        if points:
            x = [found.median for _, found in points]
            errors = [[f.median - f.low for _, f in points], [f.high - f.median for _, f in points]]
            y = [position for position, _ in points]
            axes.errorbar(x, y, xerr=errors, fmt=marker, color=color, label=label, markersize=5, linewidth=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10]
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [f"{case.model}  {case.dtype}  {case.algorithm}" for case in cases])
    axes.set_xlabel(f"time of a step ÷ {BASELINE} (median, quartiles; less is faster)")
    axes.set_title(f"Optimizer steps with and without GC, {benchmark.machine.get('threads', '?')} threads", loc="left")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
