"""The report of a benchmark: tables for the terminal and in Markdown, a plot, and a conclusion in words."""

from __future__ import annotations

import statistics

from rich.table import Table
from rich.text import Text

from gradcentral.bench.benchmark import Benchmark, Case
from gradcentral.bench.steps import ATTACHED, BASELINE, LOOP, OURS, OURS_UPDATE, TORCH_DEFAULT
from gradcentral.bench.timing import Ratio
from gradcentral.plotting import LIGHT, new_figure, style, to_png

__all__ = ["NOISY", "conclusion", "markdown_table", "plot_benchmark", "short_table", "terminal_table"]

NOISY = 0.10  # if two timings of the same step differ by more, the ratios are too noisy to interpret

# As in every figure, the color is that of the arm; the marker distinguishes the implementations.
_SERIES = {
    OURS: ("gradient", "o", "full"),
    OURS_UPDATE: ("update", "s", "full"),
    ATTACHED: ("gradient", "^", "none"),
    LOOP: ("gradient", "v", "none"),
    TORCH_DEFAULT: ("none", "D", "none"),
}
_TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10)


def short_table(benchmark: Benchmark) -> Table:
    """Return a table with one row per model: the ratio of the fused GC step, with the slowest case marked."""
    columns = list(dict.fromkeys((case.dtype, case.algorithm) for case in benchmark.cases))
    found = {(case.model, case.dtype, case.algorithm): case.ratios[OURS] for case in benchmark.cases}
    worst = max(found, key=lambda case: found[case].median, default=None)
    grid = Table(title=f"{OURS} ÷ {BASELINE}; ◀ slowest", title_justify="left")
    grid.add_column("model", no_wrap=True)
    for dtype, algorithm in columns:
        grid.add_column(f"{dtype} {algorithm}", justify="right")
    for model in dict.fromkeys(case.model for case in benchmark.cases):
        cells = []
        for column in columns:
            ratio = found.get((model, *column))
            mark = " ◀" if (model, *column) == worst else ""
            cells.append(Text(f"{_median(ratio)}{mark}", style=_color(ratio)))
        grid.add_row(model, *cells)
    return grid


def terminal_table(benchmark: Benchmark) -> Table:
    """Return a table with one row per case and one column per alternative: the ratio of times, with quartiles."""
    names = list(dict.fromkeys(name for case in benchmark.cases for name in case.ratios))
    grid = Table(title=f"time per step ÷ {BASELINE}: median (quartiles) of paired rounds", title_justify="left")
    for heading in ("model", "type", "optimizer"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("ms", *names, "gradcentral ÷ streaming", "attaching ÷ streaming g", "attaching, µs/param", "noise"):
        grid.add_column(heading, justify="right")
    for case in benchmark.cases:
        cells = [_quartiles(case.ratios.get(name), colored=name == OURS) for name in names]
        per_parameter = "" if case.attaching_us is None else f"{case.attaching_us:.1f}"
        bounds = _median(case.over_streaming, ""), _median(case.attaching, ""), per_parameter
        grid.add_row(*_start(case), *cells, *bounds, f"±{case.noise:.0%}")
    return grid


def markdown_table(benchmark: Benchmark) -> str:
    """Return a table of medians, one row per case; bold if the upper quartile of the fused GC step is below 1."""
    names = (TORCH_DEFAULT, LOOP, ATTACHED, OURS, OURS_UPDATE)
    headings = ["model", "type", "optimizer", "torch fused, ms", *names, "gradcentral ÷ streaming", "noise"]
    rows = [headings, ["---"] * 3 + ["--:"] * (len(headings) - 3)]
    for case in benchmark.cases:
        cells = {name: _median(case.ratios.get(name)) for name in names}
        if case.ratios[OURS].high < 1:
            cells[OURS] = f"**{cells[OURS]}**"
        rows.append([*_start(case), *cells.values(), _median(case.over_streaming), f"±{case.noise:.0%}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _start(case: Case) -> tuple[str, str, str, str]:
    return case.model, case.dtype, case.algorithm, f"{case.milliseconds:.2f}"


def _median(found: Ratio | None, missing: str = "–") -> str:
    return missing if found is None else f"{found.median:.2f}"


def _quartiles(found: Ratio | None, colored: bool) -> Text:
    if found is None:
        return Text("–")
    return Text(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})", style=_color(found) if colored else "")


def _color(found: Ratio | None) -> str:
    return "" if found is None else "green" if found.high < 1 else "red" if found.low > 1 else "yellow"


def plot_benchmark(benchmark: Benchmark) -> bytes:
    """Draw each case's ratios with their quartiles on a logarithmic axis, where less is faster, as a PNG."""
    cases = benchmark.cases[::-1]
    with style(LIGHT):
        figure = new_figure(9, 1.6 + 0.3 * len(cases))
        axes = figure.subplots()
        for name, (arm, marker, fill) in _SERIES.items():
            rows = [row for row, case in enumerate(cases) if name in case.ratios]
            found = [cases[row].ratios[name] for row in rows]
            medians = [ratio.median for ratio in found]
            spread = [[ratio.median - ratio.low for ratio in found], [ratio.high - ratio.median for ratio in found]]
            look = {"color": LIGHT.arms[arm], "fmt": marker, "fillstyle": fill, "markersize": 5, "linewidth": 1}
            axes.errorbar(medians, rows, xerr=spread, label=name, **look)
        axes.axvline(1, color=LIGHT.text, linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(cases)), [f"{case.model}  {case.dtype}  {case.algorithm}" for case in cases])
        axes.set_xlabel(f"time per step ÷ {BASELINE} (median, quartiles; less is faster)")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        threads = benchmark.machine.get("threads", "?")
        return to_png(figure, f"Optimizer steps with and without GC, threads: {threads}")


def conclusion(benchmark: Benchmark) -> str:
    """Summarize where the fused GC step is faster or slower than the baseline, unless the timings are too noisy."""
    cases = benchmark.cases
    noise = statistics.median([case.noise for case in cases] or [0.0])
    if noise > NOISY:
        return (
            f"Too noisy to tell: two timings of the same step differed by ±{noise:.0%}. "
            "Close other programs and run the benchmark again."
        )
    faster = sum(case.ratios[OURS].high < 1 for case in cases)
    slower = [case for case in cases if case.ratios[OURS].low > 1]
    text = f"A step with GC is faster than {BASELINE} in {faster} of {len(cases)} cases, slower in {len(slower)}, "
    text += f"and within the quartiles in the rest (noise ±{noise:.0%})."
    if slower:
        names = [f"{case.model} {case.dtype} {case.algorithm} {case.ratios[OURS].median:.2f}" for case in slower]
        text += f" Slower: {', '.join(names)}."
    for case in cases:
        if case.monitoring:
            added = ", ".join(f"{added:.2%} ({network})" for network, added in case.monitoring.items())
            text += f" Monitor adds to an iteration at its default interval: {added}."
    return text
