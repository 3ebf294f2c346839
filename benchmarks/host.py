"""Measure the time that a step on a GPU takes the host, on a machine without one.

    python benchmarks/host.py    needs Triton

The tensors have the shapes of a model and lie in the memory of the host, and launching the kernel does nothing.
Everything else runs as on a CUDA device: the checks, the pointers and the arguments of the launch. The launch itself
and the lookup of the current stream are missing.
"""

from __future__ import annotations

import os
import statistics
import sys
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "GRADCENTRAL_KERNELS": "triton"}  # so that the plans accept CPU tensors
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from gradcentral import centralize
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.steps import OPTIMIZERS, OURS, OURS_UPDATE, create_layout, optimizer_steps
from gradcentral.kernels.triton import plans


class _NoKernel:
    """Takes the place of the kernel and of its compiled variants: a launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **options: self


class _NoStep(torch.optim.Optimizer):
    """Changes nothing, so that the hooks alone take time."""

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


def _attached(model: str) -> _NoStep:
    layout = create_layout(MODELS[model](), torch.float32, "cpu")
    optimizer = _NoStep([entry.parameter for entry in layout.entries], {})
    centralize(optimizer, layout=layout)
    return optimizer


def _microseconds(run: Callable[[], object]) -> str:
    timeit.timeit(run, number=20)
    return f"{1e6 * statistics.median(timeit.repeat(run, number=20, repeat=25)) / 20:.0f} µs"


def main() -> None:
    """Print the microseconds of the steps of each model."""
    torch.set_num_threads(1)
    with (
        mock.patch.object(plans, "run", _NoKernel()),
        mock.patch.object(plans.TritonPlan, "_on_device", return_value=nullcontext()),
    ):
        for model in ("ResNet-50", "tiny CNN"):
            for optimizer in OPTIMIZERS:
                runs = optimizer_steps(MODELS[model](), optimizer, torch.float32)
                found = f"gradient {_microseconds(runs[OURS])}, update {_microseconds(runs[OURS_UPDATE])}"
                print(f"{model}, gradcentral.{optimizer}: {found}")
            print(f"{model}, hooks of centralize on a step that does nothing: {_microseconds(_attached(model).step)}")


if __name__ == "__main__":
    main()
