"""Training runs that are killed and resumed, for test_checkpoints.py: a program that prints its results as JSON.

The main process imports torch but does not compute with it; each training run is a fork that the main process kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once here, because otherwise every fork imports it in its first step, for seconds
from torch import nn
from torch.optim import Optimizer

from gradcentral.experiment.tasks.digits import cnn, train
from tests.optim.creation import create_optimizer

STEPS, SAVE_EVERY, KILLS, REPEATS = 14, 3, 2, 2
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
X, Y = train.tensors


def make(case: str, model: nn.Module) -> Optimizer:
    """Create the optimizer of a case, written "who-centers kind placement"."""
    who, kind, placement = case.split()
    options = SGD if kind == "SGD" else {"lr": 1e-2}
    return create_optimizer(who, kind, model, placement, options)


CASES = [
    f"{who} {kind} {placement}"
    for who, kind in (("attached", "SGD"), ("attached", "AdamW"), ("gradcentral", "SGD"), ("gradcentral", "AdamW"))
    for placement in ("gradient", "update")
]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: whenever the process is killed, the file is the old one or the new one."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def training(case: str, folder: Path, report: int) -> None:
    """Train from the last checkpoint to the end; write a byte to ``report`` after every step."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = nn.Sequential(cnn(), nn.Dropout(0.1))
    optimizer = make(case, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    path, start = folder / "checkpoint.pt", 0
    if path.exists():
        found = torch.load(path, weights_only=True)
        start = found["step"]
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])
        torch.set_rng_state(found["random"])
    with (folder / "starts").open("a") as file:
        file.write(f"{start}\n")
    for step in range(start, STEPS):
        batch = torch.randint(len(X), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            content = {"step": step + 1, "random": torch.get_rng_state(), "schedule": schedule.state_dict()}
            save(path, content | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        os.write(report, b".")


def run(case: str, folder: Path, kill_after: int | None) -> bool:
    """Train in a fork, which is killed at a random moment after ``kill_after`` steps. Return whether it finished."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            training(case, folder, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    began, steps = time.monotonic(), 0
    while steps != kill_after and os.read(reading, 1):
        steps += 1
    if kill_after is not None:
        # At any moment of a step, or while a checkpoint is written.
        time.sleep(random.uniform(0, (time.monotonic() - began) / max(steps, 1)))
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{case}: the training failed")
    return True


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the paths of the entries in which two checkpoints are not bit-identical."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in differing(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [path for key in range(len(one)) for path in differing(one[key], other[key], f"{where}/{key}")]
    return [] if type(one) is type(other) and one == other else [where]


def main(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Return, per case and repetition, the kills, the steps resumed from, and the differing entries."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        whole = root / case.replace(" ", "-")
        whole.mkdir()
        run(case, whole, None)
        expected = torch.load(whole / "checkpoint.pt", weights_only=True)
        found[case] = []
        for repeat in range(REPEATS):
            folder = whole / str(repeat)
            folder.mkdir()
            after = [random.randint(1, STEPS - 2) for _ in range(KILLS)]
            killed = sum(not run(case, folder, count) for count in after)
            run(case, folder, None)
            starts = [int(line) for line in (folder / "starts").read_text().split()]
            result = torch.load(folder / "checkpoint.pt", weights_only=True)
            found[case].append(
                {"after": after, "killed": killed, "starts": starts, "differing": differing(expected, result)}
            )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    with tempfile.TemporaryDirectory() as path:
        json.dump(main(Path(path)), sys.stdout)
