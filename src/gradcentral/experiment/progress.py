"""Progress bars of a comparison on a terminal; elsewhere one plain line per finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcentral.experiment.comparison import spread
from gradcentral.experiment.store import Key, Run
from gradcentral.extras import optional
from gradcentral.json_lines import read_complete

__all__ = ["Progress"]


class Progress:
    """Displays a comparison; use it in a ``with`` block and call `finished` for every run.

    Args:
        keys: all requested runs.
        before: the runs that were finished earlier.
        epochs: per run; None if unknown, so that the bars count runs.
        metric: its name.
        epochs_file: the file to which runs append a line per epoch.
        show: whether to display anything.
    """

    def __init__(
        self, keys: Sequence[Key], before: Sequence[Run], epochs: int | None, metric: str, epochs_file: Path, show: bool
    ) -> None:
        self._keys, self._epochs, self._metric, self._epochs_file = keys, epochs, metric, epochs_file
        self._done = {run.key: run for run in before}
        self._console = optional("rich.console").Console(highlight=False, quiet=not show)
        self._live = self._bars() if self._console.is_terminal and show else None

    def __enter__(self) -> Progress:
        if self._done:
            self._console.print(f"{len(self._done)} of {len(self._keys)} runs were finished before")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def finished(self, run: Run) -> None:
        """Display a finished run."""
        self._done[run.key] = run
        if self._live is not None:
            return
        width = len(str(len(self._keys)))
        result = (
            f"diverged in epoch {run.diverged_at}"
            if run.diverged_at is not None
            else f"{self._metric} {run.final('test_metric'):.4g}, training loss {run.final('train_loss'):.4g}"
        )
        self._console.print(f"{len(self._done):{width}}/{len(self._keys)}  {run.key}: {result}  ({run.seconds:.1f} s)")

    def _bars(self) -> Any:
        """Make one bar per optimizer and arm, and one for all runs, redrawn four times per second by rich's thread."""
        rich = optional("rich.progress")
        texts = ("{task.description}", rich.BarColumn(), "{task.fields[text]}", rich.TimeRemainingColumn())
        bars = rich.Progress(*texts, console=self._console)
        rows = {}
        for prefix in [*dict.fromkeys(key[:2] for key in self._keys), ()]:
            keys = [key for key in self._keys if key[: len(prefix)] == prefix]
            rows[bars.add_task(", ".join(prefix) or "all runs", total=len(keys), text="")] = keys

        def render() -> Any:
            epochs = self._epochs_so_far()
            for bar, keys in rows.items():
                bars.update(bar, completed=self._completed(keys, epochs), text=self._text(keys))
            return bars.get_renderable()

        live = optional("rich.live").Live
        return live(console=self._console, get_renderable=render, refresh_per_second=4, transient=True)

    def _epochs_so_far(self) -> dict[Key, int]:
        if not self._epochs_file.exists():
            return {}
        lines = map(json.loads, read_complete(self._epochs_file).splitlines())
        return {Key(optimizer, arm, seed): epoch for optimizer, arm, seed, epoch in lines}

    def _completed(self, keys: Sequence[Key], epochs: dict[Key, int]) -> float:
        return sum(1.0 if key in self._done else epochs.get(key, 0) / (self._epochs or 1e9) for key in keys)

    def _text(self, keys: Sequence[Key]) -> str:
        done = [self._done[key] for key in keys if key in self._done]
        finals = [value for run in done if (value := run.final("test_metric")) is not None]
        diverged = len(done) - len(finals)
        # A mean over several arms or optimizers would mean nothing.
        metric = f"  {self._metric} {spread(finals)}" if finals and len({key[:2] for key in keys}) == 1 else ""
        return f"{len(done)}/{len(keys)}{metric}" + (f"  {diverged} diverged" if diverged else "")
