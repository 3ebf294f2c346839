"""Progress bars of a comparison on a terminal or in a notebook; elsewhere one plain line per finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradcentral.experiment.comparison import spread
from gradcentral.experiment.store import Key, Run
from gradcentral.extras import optional
from gradcentral.json_lines import read_complete

__all__ = ["Progress"]


class Progress:
    """Display of a comparison; use it in a ``with`` block and call `finished` for every run.

    If the number of ``epochs`` per run is known, the bars also follow the epochs: runs in this process call `epoch`,
    and worker processes append to the file given to `follow`.
    """

    def __init__(self, keys: Sequence[Key], before: Sequence[Run], epochs: int | None, metric: str, show: bool) -> None:
        self._keys, self._epochs, self._metric = keys, epochs, metric
        self._reached: dict[tuple[Any, ...], int] = {}
        self._file: Path | None = None
        self._done = {run.key: run for run in before}
        self._console = optional("rich.console").Console(highlight=False, quiet=not show)
        # A notebook redraws bars only with ipywidgets; without it, each finished run gets a line.
        notebook = self._console.is_jupyter and find_spec("ipywidgets") is not None
        self._redraws = self._console.is_terminal or notebook
        self._live = self._bars() if self._redraws and show else nullcontext()

    def __enter__(self) -> Progress:
        if self._done:
            self._console.print(f"{len(self._done)} of {len(self._keys)} runs were finished earlier")
        self._live.__enter__()
        if not isinstance(self._live, nullcontext):
            self._live.refresh()  # so that runs which end at once are shown too
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def epoch(self, key: Key, epoch: int) -> None:
        """Display that a run in this process finished an epoch."""
        self._reached[key] = epoch

    def follow(self, path: Path) -> None:
        """Follow a file to which worker processes append a line per epoch: a JSON list of the key and the epoch."""
        self._file = path

    def finished(self, run: Run) -> None:
        """Display a finished run."""
        self._done[run.key] = run
        if self._redraws:
            return
        result = f"diverged in epoch {run.diverged_at}"
        if run.diverged_at is None:
            metric = run.final("test_metric")
            result = f"{self._metric} {'not finite' if metric is None else f'{metric:.4g}'}, "
            result += f"training loss {run.final('train_loss'):.4g}"
        width = len(str(len(self._keys)))
        self._console.print(f"{len(self._done):{width}}/{len(self._keys)}  {run.key}: {result}  ({run.seconds:.1f} s)")

    def _bars(self) -> Any:
        """Create one bar per optimizer and arm, and one for all runs, which rich redraws four times per second."""
        rich = optional("rich.progress")
        texts = ("{task.description}", rich.BarColumn(), "{task.fields[text]}", rich.TimeRemainingColumn())
        bars = rich.Progress(*texts, console=self._console)
        rows = {}
        for prefix in [*dict.fromkeys(key[:2] for key in self._keys), ()]:
            keys = [key for key in self._keys if key[: len(prefix)] == prefix]
            rows[bars.add_task(", ".join(prefix) or "all runs", total=len(keys), text="")] = keys

        def render() -> Any:
            if self._file is not None and self._file.exists():
                lines = map(json.loads, read_complete(self._file).splitlines())
                self._reached |= {tuple(key): epoch for *key, epoch in lines}
            for bar, keys in rows.items():
                reached = (self._reached.get(key, 0) / (self._epochs or 1e9) for key in keys)
                parts = (1.0 if key in self._done else part for key, part in zip(keys, reached, strict=True))
                bars.update(bar, completed=sum(parts), text=self._text(keys))
            return bars.get_renderable()

        live = optional("rich.live").Live
        return live(console=self._console, get_renderable=render, refresh_per_second=4, transient=True)

    def _text(self, keys: Sequence[Key]) -> str:
        done = [self._done[key] for key in keys if key in self._done]
        finals = [value for run in done if (value := run.final("test_metric")) is not None]
        diverged = sum(run.diverged_at is not None for run in done)
        # A mean over several arms or optimizers would be meaningless.
        metric = f"  {self._metric} {spread(finals)}" if finals and len({key[:2] for key in keys}) == 1 else ""
        return f"{len(done)}/{len(keys)}{metric}" + (f"  {diverged} diverged" if diverged else "")
