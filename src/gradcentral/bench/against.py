"""Comparison of a benchmark with an earlier one of the same machine."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from gradcentral.bench.benchmark import Benchmark, Case
from gradcentral.bench.steps import BASELINE, OURS, OURS_UPDATE

__all__ = ["against_table", "check_same_machine"]


def check_same_machine(now: dict[str, str], earlier: dict[str, str]) -> None:
    """Refuse to compare benchmarks of different machines.

    Raises:
        ValueError: the processor, the CUDA device or the number of threads differ.
    """
    for name in ("processor", "device", "threads"):
        if now.get(name) != earlier.get(name):
            raise ValueError(
                f"against: the earlier benchmark has {name} {earlier.get(name, 'none')!r}, this one "
                f"{now.get(name, 'none')!r}: compare benchmarks of the same machine"
            )


def against_table(now: Benchmark, earlier: Benchmark) -> Table:
    """Return a table of ratios, earlier and now; a change is named if the quartiles do not overlap."""
    before = {_key(case): case for case in earlier.cases}
    grid = Table(title=f"time per step ÷ {BASELINE}, earlier and now", title_justify="left")
    grid.add_column("model", no_wrap=True)
    for heading in ("type", "optimizer"):
        grid.add_column(heading)
    for heading in ("gradient", "", "update", ""):
        grid.add_column(heading, justify="right")
    for case in now.cases:
        cells: list[Text] = []
        for name in (OURS, OURS_UPDATE):
            cells += _change(case, before.get(_key(case)), name)
        grid.add_row(*_key(case), *cells)
    return grid


def _key(case: Case) -> tuple[str, str, str]:
    return case.model, case.dtype, case.algorithm


def _change(case: Case, before: Case | None, name: str) -> tuple[Text, Text]:
    """Return the two medians, and the change with its mark."""
    new, old = case.ratios.get(name), None if before is None else before.ratios.get(name)
    if new is None or old is None:
        return Text("–" if new is None else f"{new.median:.2f}"), Text("–" if new is None else "new")
    change = f"{new.median / old.median - 1:+.0%}"
    style = "red" if new.low > old.high else "green" if new.high < old.low else ""
    mark = {"red": f"slower {change}", "green": f"faster {change}", "": change}[style]
    return Text(f"{old.median:.2f} → {new.median:.2f}"), Text(mark, style=style)
