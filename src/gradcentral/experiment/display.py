"""What a comparison shows while it runs: the mean per arm, live on a terminal, else one plain line a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gradcentral.experiment.comparison import spread
from gradcentral.experiment.store import Key, Run
from gradcentral.extras import optional

__all__ = ["Display"]


class Display:
    """Follows a comparison; use it in a ``with`` block and call `finished` for every run.

    Args:
        keys: all the runs that were asked for.
        before: those that were finished earlier.
        epochs: of a run; None where that is not known.
        metric: its name.
        progress: the file to which runs add a line every epoch.
        show: whether to show anything.
    """

    def __init__(
        self, keys: Sequence[Key], before: Sequence[Run], epochs: int | None, metric: str, progress: Path, show: bool
    ) -> None:
        self._keys, self._epochs, self._metric, self._show = keys, epochs, metric, show
        self._done = {run.key: run for run in before}
        self._running: dict[Key, tuple[int, float | None]] = {}
        self._progress, self._read_to = progress, 0
        self._resumed, self._started = len(self._done), time.monotonic()
        self._console = optional("rich.console").Console(highlight=False)
        self._live: Any = None
        if show and self._console.is_terminal:
            # rich asks for this object's picture a few times a second, from a thread of its own.
            self._live = optional("rich.live").Live(self, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self._show and self._resumed:
            self._console.print(f"{self._resumed} of {len(self._keys)} runs were finished before")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def finished(self, run: Run) -> None:
        """A run is over."""
        self._done[run.key] = run
        if not self._show or self._live is not None:
            return
        width = len(str(len(self._keys)))
        result = (
            f"diverged in epoch {run.diverged_at}"
            if run.diverged_at is not None
            else f"{self._metric} {run.final('test_metric'):.4g}, training loss {run.final('train_loss'):.4g}"
        )
        self._console.print(f"{len(self._done):{width}}/{len(self._keys)}  {run.key}: {result}  ({run.seconds:.1f} s)")

    def __rich__(self) -> Any:
        """A picture of now."""
        self._follow()
        table = optional("rich.table").Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("optimizer", "arm", "runs", "epochs", f"{self._metric}, finished", "running"):
            table.add_column(title, header_style="dim")
        for optimizer, arm in dict.fromkeys((key.optimizer, key.arm) for key in self._keys):
            table.add_row(optimizer, arm, *self._cells([k for k in self._keys if k[:2] == (optimizer, arm)]))
        bar = optional("rich.progress_bar").ProgressBar(total=len(self._keys), completed=self._completed(), width=40)
        text = optional("rich.text").Text(f"{len(self._done)} of {len(self._keys)} runs, {self._remaining()}")
        grid = optional("rich.table").Table.grid(padding=(0, 2))
        grid.add_row(bar, text)
        return optional("rich.console").Group(table, "", grid)

    def _cells(self, keys: list[Key]) -> tuple[str, str, str, str]:
        done = [self._done[key] for key in keys if key in self._done]
        running = [self._running[key] for key in keys if key in self._running and key not in self._done]
        epochs = sum(len(run.epochs) for run in done) + sum(epoch for epoch, _ in running)
        finals = [value for run in done if (value := run.final("test_metric")) is not None]
        diverged = len(done) - len(finals)
        now = [value for _, value in running if value is not None]
        total = "" if self._epochs is None else f"/{self._epochs * len(keys)}"
        return (
            f"{len(done)}/{len(keys)}",
            f"{epochs}{total}",
            spread(finals) + (f"  {diverged} diverged" if diverged else ""),
            spread(now[:1]) if len(now) == 1 else spread(now) if now else "",
        )

    def _completed(self) -> float:
        running = [epoch for key, (epoch, _) in self._running.items() if key not in self._done]
        return len(self._done) + (sum(running) / self._epochs if self._epochs else 0.0)

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self._started
        new = self._completed() - self._resumed
        if new <= 0:
            return f"{elapsed:.0f} s"
        return f"{elapsed:.0f} s, about {elapsed * (len(self._keys) - self._completed()) / new:.0f} s left"

    def _follow(self) -> None:
        """Read what the runs have written since the last time."""
        try:
            with self._progress.open("rb") as file:
                file.seek(self._read_to)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            optimizer, arm, seed, epoch, metric = json.loads(line)
            self._running[Key(optimizer, arm, seed)] = (epoch, metric)
