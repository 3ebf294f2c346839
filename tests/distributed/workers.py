"""Processes that act as ranks: started once per number of ranks, they run one case after another.

Importing torch takes seconds, so the processes are reused. If a case fails or hangs on any rank, all of them are
killed, and the next case starts new ones.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

# A case takes a few seconds, the first one longer. The limits also end collectives that deadlock.
LIMIT_S = 120
COLLECTIVE_LIMIT_S = 90
START_LIMIT_S = 120


class Workers:
    """Ranks of one gloo process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S) -> list[Any]:
        """Return the results of ``case(*arguments)`` on all ranks; fail the test if it fails on any.

        The case must be a module-level function, because it is pickled.
        """
        __tracebackhide__ = True
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        return self._answers(f"{case.__name__}{arguments}", limit_s)

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gradcentral-ranks-")
        meeting_point = str(Path(self._folder.name) / "store")
        spawning = multiprocessing.get_context("spawn")
        for rank in range(self.ranks):
            here, there = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(rank, self.ranks, meeting_point, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._answers("the process group", START_LIMIT_S)

    def _answers(self, what: str, limit_s: float) -> list[Any]:
        __tracebackhide__ = True
        until = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        failure = ""
        while len(answers) < self.ranks and not failure:
            for rank in set(range(self.ranks)) - set(answers):
                try:
                    if not self._pipes[rank].poll(0.005):
                        continue
                    answers[rank], failure = self._pipes[rank].recv()
                except EOFError:
                    failure = "the process has exited"
                if failure:
                    failure = f"{what}: rank {rank} of {self.ranks}: {failure}"
                    break
            if not failure and time.monotonic() > until:
                missing = sorted(set(range(self.ranks)) - set(answers))
                failure = f"{what}: ranks {missing} of {self.ranks} have not answered in {limit_s} s"
        if failure:
            self.stop()
            pytest.fail(failure, pytrace=False)
        return [answers[rank] for rank in range(self.ranks)]

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def _serve(rank: int, ranks: int, meeting_point: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT_S),
    )
    pipe.send((None, ""))
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((case(*arguments), ""))
        except Exception:
            pipe.send((None, traceback.format_exc()))
