"""The benchmark of optimizer steps: one case per model, type and optimizer."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch

from gradcentral.bench import cuda, steps
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.timing import Ratio, clock_for, interleave, ratio
from gradcentral.kernels import native, unavailable_reasons

__all__ = ["BENCH_DTYPES", "Benchmark", "Case", "bench", "describe_machine", "to_case"]

BENCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_STREAMS = (steps.STREAM, steps.STREAM_GRADIENTS)


@dataclass(frozen=True)
class Case:
    """One model, type and optimizer: the time of every alternative over that of torch's fused step without GC."""

    model: str
    dtype: str
    algorithm: str
    milliseconds: float  # median time of the baseline
    ratios: dict[str, Ratio]
    noise: float  # between two timings of the baseline: the larger of |log median| and half the interquartile range
    over_streaming: Ratio | None = None  # the fused GC step over reading and writing the same bytes
    attaching: Ratio | None = None  # the time that `centralize` adds, over reading and writing the gradients once
    attaching_us: float | None = None  # the time that `centralize` adds per centered parameter, in microseconds
    on_device: cuda.CudaMeasurements | None = None
    monitoring: dict[str, float] = field(default_factory=dict)  # fraction that `Monitor` adds, by network


@dataclass
class Benchmark:
    """The cases of one benchmark and the machine that they were measured on."""

    cases: list[Case] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the benchmark as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def bench(
    models: Sequence[str] = tuple(MODELS),
    optimizers: Sequence[str] = tuple(steps.OPTIMIZERS),
    dtypes: Sequence[str] = tuple(BENCH_DTYPES),
    *,
    rounds: int = 60,
    seconds: float = 12.0,
    peers: bool = False,
    device: str = "cpu",
) -> Iterator[Case]:
    """Measure the optimizer steps of models, each case when the iterator reaches it, for about ``seconds``.

    Raises:
        ValueError: a name is unknown, or another library is not installed.
    """
    choices: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "models": (models, MODELS),
        "optimizers": (optimizers, steps.OPTIMIZERS),
        "dtypes": (dtypes, BENCH_DTYPES),
        "device": ([device.partition(":")[0]], ("cpu", "cuda")),
    }
    for parameter, (names, known) in choices.items():
        if unknown := [name for name in names if name not in known]:
            kind = parameter.removesuffix("s")
            raise ValueError(f"{parameter}: unknown {kind} {unknown[0]!r}; choose from {', '.join(known)}")

    def measure_case(model: str, dtype: str, optimizer: str) -> Case:
        shapes = list(MODELS[model]())
        runs = steps.optimizer_steps(shapes, optimizer, BENCH_DTYPES[dtype], device, peers)
        times = interleave(runs, rounds, seconds, clock=clock_for(device))
        case = to_case(model, dtype, optimizer, times, sum(vectors is not None for _, vectors in shapes))
        on_device = None if device == "cpu" else cuda.measure(runs, steps.OURS, steps.BASELINE, rounds, seconds / 4)
        return replace(case, on_device=on_device)

    return itertools.starmap(measure_case, itertools.product(models, dtypes, optimizers))


def to_case(model: str, dtype: str, optimizer: str, times: dict[str, list[float]], centered: int = 0) -> Case:
    """Summarize the times of all alternatives; the cost of attaching is per ``centered`` parameter."""
    base = times[steps.BASELINE]
    again = ratio(times[steps.BASELINE_AGAIN], base)
    added = [attached - plain for attached, plain in zip(times[steps.ATTACHED], base, strict=True)]
    unlisted = {steps.BASELINE, steps.BASELINE_AGAIN, *_STREAMS}
    return Case(
        model,
        dtype,
        optimizer,
        milliseconds=statistics.median(base) * 1e3,
        ratios={name: ratio(seconds, base) for name, seconds in times.items() if name not in unlisted},
        noise=max(abs(math.log(again.median)), (again.high - again.low) / 2),
        over_streaming=ratio(times[steps.OURS], times[steps.STREAM]) if steps.STREAM in times else None,
        attaching=ratio(added, times[steps.STREAM_GRADIENTS]) if steps.STREAM in times else None,
        attaching_us=statistics.median(added) * 1e6 / centered if centered else None,
    )


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Describe the machine, its software and the kernels in use."""
    kernels = "; ".join(f"{name}: {reason or 'runs'}" for name, reason in unavailable_reasons().items())
    if not native.unavailable_reason() and not native.has_openmp():
        kernels += ", on one thread (built without OpenMP)"
    return {
        **cuda.describe_gpu(device),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradcentral": metadata.version("gradcentral"),
        "kernels": kernels,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # on Linux only, where `platform` has only the architecture
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    fields = dict(re.findall(r"(model name|cpu family|model)\s*: (.+)", text))
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return f"{name}{family}, {os.cpu_count()} cores"
