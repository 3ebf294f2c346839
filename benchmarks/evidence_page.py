"""The tables, sentences and figures of docs/should-i-use-it.md, computed from the raw runs.

Each part of the page between ``<!-- NAME -->`` and ``<!-- end -->`` is the text that `parts` returns for that name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence_analysis import (
    KINDS,
    Correlation,
    Effect,
    cells,
    confirmations,
    kinds,
    means_of,
    share_correlation,
    speeds,
)
from evidence_runs import FACTORS, read_records

from gradcentral.experiment.arms import NONE
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS
from gradcentral.extras import optional
from gradcentral.plotting import LIGHT, new_figure, style, to_png

__all__ = ["ADVICE", "FIGURES", "PAGE", "expectation", "filled", "parts", "summaries", "write_page"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "should-i-use-it.md"
FIGURES = ROOT / "docs" / "results"
ADVICE = ROOT / "src" / "gradcentral" / "diagnostics" / "evidence.json"
NAMES = {"sgd": "SGD", "adamw": "AdamW", "lion": "Lion"}
ARMS = ("gradient", "update")


def parts(results: Path) -> dict[str, str]:
    """Return the generated texts of the page by name."""
    records = read_records(results / "runs.jsonl")
    shares = {record["task"]: fmean(record["shares"]) for record in read_records(results / "probes.jsonl")}
    effects = cells(records)
    return {
        "summary": _summary(effects),
        "kinds": _kinds_table(effects, shares),
        "cells": _cells_table(effects),
        "share": _share(effects, shares),
        "rates": _rates_table(records),
        "speed": _speed_table(records),
        "means": _means_table(records),
        "confirmation": _confirmation(records, read_records(results / "confirmation.jsonl")),
        "runs": _runs(records),
    }


def filled(text: str, found: dict[str, str]) -> str:
    """Replace what is between the markers of each part.

    Raises:
        ValueError: the page lacks a part, or has one that is not generated.
    """
    named = [name for name in re.findall(r"<!-- ([\w-]+) -->", text) if name != "end"]
    if sorted(named) != sorted(found):
        raise ValueError(f"the page has the parts {', '.join(named)}; generated are {', '.join(found)}")
    for name, content in found.items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        text = before + marker + content + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def write_page(results: Path) -> list[Path]:
    """Rewrite the generated parts of the page, and draw its figures; return their paths."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts(results)), encoding="utf-8")
    records = read_records(results / "runs.jsonl")
    shares = {record["task"]: fmean(record["shares"]) for record in read_records(results / "probes.jsonl")}
    effects = cells(records)
    ADVICE.write_text(json.dumps(summaries(effects), indent=1) + "\n", encoding="utf-8")
    written = [PAGE, ADVICE]
    for name, figure, title in (
        ("evidence-kinds", _draw_kinds(effects), "Effect of GC on the test error, by kind of model"),
        ("evidence-share", _draw_shares(effects, shares), "Effect of GC and share of the gradient that it removes"),
    ):
        (FIGURES / f"{name}.png").write_bytes(to_png(figure, title))
        written.append(FIGURES / f"{name}.png")
    return written


def summaries(effects: Sequence[Effect]) -> dict[str, list[dict[str, Any]]]:
    """Return what `gradcentral.probe` reports about each kind of model."""
    found: dict[str, list[dict[str, Any]]] = {}
    for effect in kinds(effects):
        assert effect.interval is not None
        low, high = effect.interval
        numbers = {"mean": round(effect.mean, 1), "low": round(low, 1), "high": round(high, 1)}
        cells_of_it = expectation(_of_kind(effects, effect.name, effect.arm))
        found.setdefault(effect.name, []).append({"arm": effect.arm, **numbers, "cells": cells_of_it})
    return found


def _percent(value: float) -> str:
    """Format an effect in percent with its sign, with two significant digits below 10.

    >>> _percent(-3.14159), _percent(12.3), _percent(-0.001)
    ('−3.1', '+12', '0.0')
    """
    places = 0 if abs(value) >= 9.95 else 1
    text = f"{round(value, places) + 0.0:+.{places}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _with_interval(effect: Effect | None) -> str:
    if effect is None or not effect.pairs:
        return "–"
    if effect.interval is None:
        return _percent(effect.mean)
    text = f"{_percent(effect.mean)} [{_percent(effect.interval[0])}, {_percent(effect.interval[1])}]"
    return f"**{text}**" if effect.significant else text


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    lines = [titles, ["---" if side == "l" else "---:" for side in align or "l" * len(titles)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(effects: Sequence[Effect]) -> str:
    """Count the verdicts and list the cells with a clear one."""
    least, most = (extreme((effect.pairs + _lost(effect) for effect in effects), default=0) for extreme in (min, max))
    runs = f"{least}" if least == most else f"{least} to {most}"
    tasks, cells_of_all = len({effect.name for effect in effects}), len(effects)
    lines = [
        f"We trained {tasks} small tasks with SGD, AdamW and Lion at the learning rate that is best without GC: "
        f"{cells_of_all} cells of task, optimizer and placement, with {runs} pairs of runs each. After Holm's "
        "correction for all of them (5% level):",
        "",
    ]
    for verdict, title in (
        ("helps", "Lower test error"),
        ("hurts", "Higher test error"),
        ("diverges more often", "Diverges more often than without GC"),
    ):
        some = [effect for effect in effects if effect.verdict == verdict]
        by_cell: dict[str, list[str]] = {}
        for effect in some:
            by_cell.setdefault(f"`{effect.name}` with {NAMES[effect.optimizer]}", []).append(f"`{effect.arm}`")
        found = "; ".join(f"{cell} ({', '.join(arms)})" for cell, arms in by_cell.items())
        lines.append(f"- **{title}**: {len(some)} cells{': ' if found else ''}{found}.")
    nothing = sum(effect.verdict == "no clear effect" for effect in effects)
    return "\n".join([*lines, f"- **No clear effect**: the other {nothing} cells."])


def _lost(effect: Effect) -> int:
    """Return the number of pairs in which a run diverged, if those without GC diverge together with the others."""
    return max(effect.diverged, effect.baseline_diverged)


def _kinds_table(effects: Sequence[Effect], shares: dict[str, float]) -> str:
    found = {(effect.name, effect.arm): effect for effect in kinds(effects)}
    rows = []
    for kind in dict.fromkeys(KINDS.values()):
        some = [shares[task] for task, k in KINDS.items() if k == kind and task in shares]
        share = f"{fmean(some):.0%}" if some else "–"
        row = [kind, share, *(_with_interval(found.get((kind, arm))) for arm in ARMS)]
        rows.append([*row, *(expectation(_of_kind(effects, kind, arm)) for arm in ARMS)])
    titles = ["kind of model", "share", "`gradient`, %", "`update`, %", "cells, `gradient`", "cells, `update`"]
    return _table(titles, rows, "lrrrll")


def _of_kind(effects: Sequence[Effect], kind: str, arm: str) -> list[Effect]:
    return [effect for effect in effects if KINDS[effect.name] == kind and effect.arm == arm]


def expectation(effects: Sequence[Effect]) -> str:
    """Count in how many cells GC is better or worse, or diverges more often."""
    counts = Counter(effect.verdict for effect in effects)
    words = {"helps": "better", "hurts": "worse", "diverges more often": "diverges more often"}
    found = [f"{words[verdict]} in {counts[verdict]} of {len(effects)}" for verdict in words if counts[verdict]]
    return ", ".join(found) or f"no clear effect in {len(effects)}"


def _cells_table(effects: Sequence[Effect]) -> str:
    found = {(effect.name, effect.optimizer, effect.arm): effect for effect in effects}
    rows = []
    for task in KINDS:
        for optimizer in OPTIMIZERS:
            some = [found.get((task, optimizer, arm)) for arm in ("gradient", "regularized", "update")]
            if any(some):
                pairs = max(effect.pairs + _lost(effect) for effect in some if effect is not None)
                rows.append([f"`{task}`", NAMES[optimizer], str(pairs), *map(_with_divergence, some)])
    titles = ["task", "optimizer", "pairs", "`gradient`, %", "`regularized`, %", "`update`, %"]
    return _table(titles, rows, "llrrrr")


def _with_divergence(effect: Effect | None) -> str:
    if effect is None or not (effect.diverged or effect.baseline_diverged):
        return _with_interval(effect)
    text = f"{effect.diverged} diverged (without GC: {effect.baseline_diverged})"
    return f"{text}; {_with_interval(effect)}" if effect.pairs > 1 else text


def _share(effects: Sequence[Effect], shares: dict[str, float]) -> str:
    lines = []
    for arm in ARMS:
        for what, value in (("the effect", lambda e: e.mean), ("the size of the effect", lambda e: abs(e.mean))):
            found = share_correlation(effects, shares, arm, value)
            if found is not None:
                lines.append(f"- `{arm}`: with {what}, {_correlation(found)}.")
    return "\n".join(lines) or "Fewer than three tasks have been measured."


def _correlation(found: Correlation) -> str:
    excludes = found.low > 0 or found.high < 0
    verdict = "the interval excludes zero" if excludes else "the interval contains zero"
    numbers = f"ρ = {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]".replace("-", "−")
    return f"{numbers} over {found.cells} cells of {found.tasks} tasks; {verdict}"


def _rates_table(records: Sequence[dict[str, Any]]) -> str:
    columns: list[tuple[tuple[float, ...], str]] = [((0.25,), "÷ 4"), ((1.0,), "best"), ((4.0,), "× 4")]
    columns.append((FACTORS, "mean of the three"))
    found = {
        (title, effect.name, effect.arm): effect for some, title in columns for effect in kinds(cells(records, some))
    }
    rows = []
    for kind in dict.fromkeys(KINDS.values()):
        for arm in ARMS:
            summaries = [found.get((title, kind, arm)) for _, title in columns]
            if any(summaries):
                rows.append([kind, f"`{arm}`", *map(_with_interval, summaries)])
    return _table(["kind of model", "arm", *(f"{title}, %" for _, title in columns)], rows, "llrrrr")


def _speed_table(records: Sequence[dict[str, Any]]) -> str:
    found = {(speed.kind, speed.arm): speed for speed in speeds(records)}
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in found):
        some = [found[kind, arm] for arm in ARMS]
        medians = ["–" if speed.fraction is None else f"{speed.fraction:.0%}" for speed in some]
        rows.append([kind, *medians, *(f"{speed.never:.0%}" for speed in some), str(some[0].runs)])
    arms = [f"`{arm}`" for arm in ARMS]
    titles = ["kind of model", *(f"epochs, {arm}" for arm in arms), *(f"never, {arm}" for arm in arms), "runs"]
    return _table(titles, rows, "lrrrrr")


def _means_table(records: Sequence[dict[str, Any]]) -> str:
    drifts, dead = means_of(records, "drift"), means_of(records, "dead")
    rows = []
    for task in KINDS:
        for optimizer in OPTIMIZERS:
            if (task, optimizer, NONE) in drifts:
                keys = [(task, optimizer, arm) for arm in (NONE, *ARMS)]
                units = [f"{dead[key]:.1%}" if key in dead else "–" for key in keys]
                moved = [f"{drifts[key]:.2g}" if drifts.get(key, 0) >= 1e-4 else "0" for key in keys]
                rows.append([f"`{task}`", NAMES[optimizer], *moved, *units])
    arms = ("none", *ARMS)
    titles = ["task", "optimizer", *(f"drift, `{arm}`" for arm in arms), *(f"dead ReLUs, `{arm}`" for arm in arms)]
    return _table(titles, rows, "llrrrrrr")


def _confirmation(records: Sequence[dict[str, Any]], fresh: Sequence[dict[str, Any]]) -> str:
    rows = []
    for before, again in confirmations(records, fresh):
        row = [f"`{before.name}`", NAMES[before.optimizer], f"`{before.arm}`"]
        row += [_with_interval(before._replace(p_holm=None)), _with_interval(again), str(again.pairs)]
        rows.append([*row, "yes" if _agrees(before, again) else "no"])
    if not rows:
        return "The findings have not been repeated yet."
    return _table(["task", "optimizer", "arm", "first, %", "fresh seeds, %", "pairs", "confirmed"], rows, "lllrrrl")


def _agrees(before: Effect, again: Effect) -> bool:
    return again.significant and before.mean * again.mean > 0


def _runs(records: Sequence[dict[str, Any]]) -> str:
    machines = Counter(record["machine"] for record in records)
    diverged = Counter(record["arm"] for record in records if record["diverged_at"] is not None)
    hours = sum(record["seconds"] for record in records) / 3600
    which = "; ".join(machines)
    lost = ", ".join(f"{number} with `{arm}`" for arm, number in sorted(diverged.items())) or "none"
    return f"{len(records):,} runs, {hours:.1f} core-hours on {which}. Diverged: {lost}."


def _draw_kinds(effects: Sequence[Effect]) -> Any:
    """Draw the summary of each kind with its interval, one line per arm."""
    found = kinds(effects)
    names = [kind for kind in dict.fromkeys(KINDS.values()) if any(effect.name == kind for effect in found)]
    with style(LIGHT):
        figure = new_figure(9, 1.2 + 0.45 * max(1, len(names)))
        axis = figure.subplots()
        axis.axvline(0, color=LIGHT.text, lw=1)
        for effect in found:
            y = names.index(effect.name) + (-0.14 if effect.arm == "gradient" else 0.14)
            color = LIGHT.arms[effect.arm]
            assert effect.interval is not None
            axis.plot(effect.interval, [y, y], color=color, lw=2.4, solid_capstyle="butt")
            first = effect.name == names[0]
            axis.plot(effect.mean, y, "D", color=color, ms=6, label=effect.arm if first else None)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xscale("symlog", linthresh=5)
        _plain_ticks(axis.xaxis)
        axis.set_xlabel("reduction of the test error, % of the error without GC    → better")
        axis.legend(loc="lower right", frameon=False)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Label a scale that is linear up to 5% and logarithmic beyond with ordinary numbers."""
    low, high = axis.get_view_interval()
    ticks = [tick for tick in (-50, -20, -10, -5, 0, 5, 10, 20, 50) if low <= tick <= high]
    axis.set_ticks(ticks, [str(tick).replace("-", "−") for tick in ticks])
    axis.set_minor_locator(optional("matplotlib.ticker").NullLocator())


def _draw_shares(effects: Sequence[Effect], shares: dict[str, float]) -> Any:
    """Draw the effect of each cell against the share that the probe reports before training."""
    markers = dict(zip(OPTIMIZERS, "os^", strict=True))
    with style(LIGHT):
        figure = new_figure(9, 4)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, arm in zip(axes, ARMS, strict=True):
            axis.axhline(0, color=LIGHT.text, lw=1)
            for optimizer, marker in markers.items():
                some = [e for e in effects if (e.arm, e.optimizer) == (arm, optimizer) and e.name in shares]
                x, y = [100 * shares[effect.name] for effect in some], [effect.mean for effect in some]
                axis.plot(x, y, marker, color=LIGHT.arms[arm], alpha=0.75, ms=6, mew=0, label=NAMES[optimizer])
            axis.set_title(arm, loc="left", fontweight="bold")
            axis.set_xlabel("share removed before training, %")
            axis.set_yscale("symlog", linthresh=5)
            _plain_ticks(axis.yaxis)
        axes[0].set_ylabel("reduction of the test error, %")
        axes[0].legend(loc="lower right", frameon=False)
    return figure
