"""The plot of a benchmark."""

from __future__ import annotations

from gradcentral.bench.benchmark import Benchmark
from gradcentral.bench.steps import ATTACHED, BASELINE, LOOP, OURS, OURS_UPDATE, TORCH_DEFAULT
from gradcentral.plotting import LIGHT, new_figure, style, to_png

__all__ = ["plot_benchmark"]

# The color is that of the arm, as in every figure; the marker tells the implementations apart.
_SERIES = {
    OURS: ("gradient", "o", "full"),
    OURS_UPDATE: ("update", "s", "full"),
    ATTACHED: ("gradient", "^", "none"),
    LOOP: ("gradient", "v", "none"),
    TORCH_DEFAULT: ("none", "D", "none"),
}
_TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10)


def plot_benchmark(benchmark: Benchmark) -> bytes:
    """Draw each case's ratios with their quartiles on a logarithmic axis, where less is faster, as a PNG."""
    cases = list(reversed(benchmark.cases))
    with style(LIGHT):
        figure = new_figure(9, 1.6 + 0.3 * len(cases))
        axes = figure.subplots()
        for name, (arm, marker, fill) in _SERIES.items():
            points = [(y, case.ratios[name]) for y, case in enumerate(cases) if name in case.ratios]
            axes.errorbar(
                [found.median for _, found in points],
                [y for y, _ in points],
                xerr=[[f.median - f.low for _, f in points], [f.high - f.median for _, f in points]],
                color=LIGHT.arms[arm],
                fmt=marker,
                fillstyle=fill,
                label=name,
                markersize=5,
                linewidth=1,
            )
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
