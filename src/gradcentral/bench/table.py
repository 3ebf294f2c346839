"""Tables of a benchmark for the terminal and for a page, and its conclusion in words."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from gradcentral.bench.benchmark import Benchmark
from gradcentral.bench.steps import ATTACHED, BASELINE, LOOP, OURS, OURS_UPDATE, TORCH_DEFAULT
from gradcentral.bench.timing import Ratio

__all__ = ["NOISY", "conclusion", "markdown_table", "terminal_table"]

NOISY = 0.10
"""If two timings of the same step differ by more than this, the ratios are too noisy to interpret."""

_MARKDOWN_COLUMNS = (TORCH_DEFAULT, LOOP, ATTACHED, OURS, OURS_UPDATE)


def terminal_table(benchmark: Benchmark) -> Table:
    """One row per case, one column per alternative: its time over the baseline's, with quartiles."""
    names = list(dict.fromkeys(name for case in benchmark.cases for name in case.ratios))
    grid = Table(title=f"time per step ÷ {BASELINE}: median (quartiles) of paired rounds", title_justify="left")
    for heading in ("model", "type", "optimizer"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("ms", *names, "gradcentral ÷ streaming", "attaching ÷ streaming g", "attaching, µs/param", "noise"):
        grid.add_column(heading, justify="right")
    for case in benchmark.cases:
        grid.add_row(
            case.model,
            case.dtype,
            case.algorithm,
            f"{case.milliseconds:.2f}",
            *[_cell(case.ratios.get(name), colored=name == OURS) for name in names],
            _median(case.over_streaming),
            _median(case.attaching),
            "" if case.attaching_us is None else f"{case.attaching_us:.1f}",
            f"±{case.noise:.0%}",
        )
    return grid


def _cell(found: Ratio | None, colored: bool) -> Text:
    if found is None:
        return Text("–")
    color = "green" if found.high < 1 else "red" if found.low > 1 else "yellow"
    return Text(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})", style=color if colored else "")


def _median(found: Ratio | None, missing: str = "") -> str:
    return missing if found is None else f"{found.median:.2f}"


def markdown_table(benchmark: Benchmark) -> str:
    """One row per case with the medians; bold if the upper quartile of the fused GC step is below 1."""
    headings = ["model", "type", "optimizer", "torch fused, ms", *_MARKDOWN_COLUMNS, "gradcentral ÷ streaming", "noise"]
    rows = [headings, ["---"] * 3 + ["--:"] * (len(headings) - 3)]
    for case in benchmark.cases:
        cells = {name: _median(case.ratios.get(name), "–") for name in _MARKDOWN_COLUMNS}
        if OURS in case.ratios and case.ratios[OURS].high < 1:
            cells[OURS] = f"**{cells[OURS]}**"
        start = [case.model, case.dtype, case.algorithm, f"{case.milliseconds:.2f}"]
        rows.append([*start, *cells.values(), _median(case.over_streaming, "–"), f"±{case.noise:.0%}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def conclusion(benchmark: Benchmark) -> str:
    """Where the fused GC step is faster or slower than the baseline, unless the machine is too noisy to tell."""
    if benchmark.noise > NOISY:
        return (
            f"Too noisy to tell: two timings of the same step differed by ±{benchmark.noise:.0%}. "
            "Close other programs and run the benchmark again."
        )
    measured = [case for case in benchmark.cases if OURS in case.ratios]
    faster = [case for case in measured if case.ratios[OURS].high < 1]
    slower = [case for case in measured if case.ratios[OURS].low > 1]
    text = (
        f"A step with GC is faster than {BASELINE} in {len(faster)} of {len(benchmark.cases)} cases, slower in "
        f"{len(slower)}, and within the quartiles in the rest (noise ±{benchmark.noise:.0%})."
    )
    if slower:
        names = [f"{case.model} {case.dtype} {case.algorithm} {case.ratios[OURS].median:.2f}" for case in slower]
        text += f" Slower: {', '.join(names)}."
    for case in benchmark.cases:
        if case.monitoring:
            added = ", ".join(f"{added:.2%} ({network})" for network, added in case.monitoring.items())
            text += f" Monitor adds to an iteration at its default interval: {added}."
    return text
