"""The cases of the benchmark: optimizer steps per model, type and optimizer, and a training iteration of ResNet-18."""

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradcentral.attach import centralize
from gradcentral.bench import cuda, steps
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.timing import Call, Clock, Ratio, clock_for, interleave, ratio
from gradcentral.diagnostics.monitor import EVERY, Monitor
from gradcentral.extras import own_version
from gradcentral.kernels import native, unavailable_reasons
from gradcentral.optim import SGD

__all__ = ["BENCH_DTYPES", "Benchmark", "Case", "bench", "describe_machine", "iteration", "resnet18"]

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
    noise: float  # of two timings of the baseline: the larger of |log median| and half the interquartile range
    over_streaming: Ratio | None = None  # the fused GC step over reading and writing the same bytes
    attaching: Ratio | None = None  # the time that `centralize` adds, over reading and writing the gradients once
    attaching_us: float | None = None  # the time that `centralize` adds per centered parameter, in microseconds
    captured: Ratio | None = None  # the fused GC step over the baseline, both replayed from CUDA graphs
    launches: dict[str, int] = field(default_factory=dict)  # CUDA kernel launches per step, without copies and fills
    peak_bytes: dict[str, int] = field(default_factory=dict)  # peak CUDA memory of a step beyond the memory before it
    monitoring: dict[str, float] = field(default_factory=dict)  # fraction that `Monitor` adds, by network


@dataclass
class Benchmark:
    """The cases of one benchmark and the machine that they were measured on."""

    cases: list[Case] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Format the benchmark as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Benchmark:
        """Read a benchmark that was written as JSON.

        Raises:
            ValueError: the file cannot be read or is not such a file.
        """
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            return cls([_read_case(case) for case in written["cases"]], dict(written["machine"]))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a bench.json that gradcentral bench has written") from error


def _read_case(written: dict[str, Any]) -> Case:
    ratios = {name: Ratio(**ratio) for name, ratio in written["ratios"].items()}
    others = {
        name: Ratio(**written[name])
        for name in ("over_streaming", "attaching", "captured")
        if written[name] is not None
    }
    return Case(**{**written, **others, "ratios": ratios})


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
    """Measure the optimizer steps of models; each case is measured on iteration, for at most about ``seconds``.

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
        found = {} if device == "cpu" else cuda.measure(runs, steps.OURS, steps.BASELINE, rounds, seconds / 4)
        centered = sum(vectors is not None for _, vectors in shapes)
        return _to_case(model, dtype, optimizer, times, centered, **found)

    return itertools.starmap(measure_case, itertools.product(models, dtypes, optimizers))


def iteration(
    *, rounds: int = 8, seconds: float = 120.0, batch: int = 128, device: str = "cpu", dtype: str = "f32"
) -> Case:
    """Measure a training iteration of ResNet-18 on 32×32 images: forward, backward and step.

    `Monitor` adds less than the noise of an iteration. Its cost is therefore computed: the time of one record over that
    of the iterations between two records. It is largest for small networks, so a network of three small layers is also
    measured.
    """
    clock = clock_for(device)
    place: Any = {"device": torch.device(device), "dtype": BENCH_DTYPES[dtype]}
    model = resnet18().to(**place)
    x, y = torch.randn(batch, 3, 32, 32, **place), torch.randint(10, (batch,), device=device)
    hooked, plain, monitored = _sgd(model), _sgd(model), _sgd(model)
    centralize(hooked, model)
    Monitor(model, monitored)
    runs = {
        steps.BASELINE: _iterate(model, plain, x, y),
        steps.BASELINE_AGAIN: _iterate(model, plain, x, y),
        steps.ATTACHED: _iterate(model, hooked, x, y),
        steps.OURS: _iterate(model, SGD(model, **steps.OPTIMIZERS["SGD"]), x, y),
        "Monitor + torch fused": _iterate(model, monitored, x, y),
    }
    runs[steps.ATTACHED]()  # first, because centralize warns if other optimizers train its parameters instead
    times = interleave(runs, rounds, seconds, warm_up=1, clock=clock)
    layers = [nn.Linear(13, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 3)]
    small = nn.Sequential(*layers).to(**place)
    x, y = torch.randn(20, 13, **place), torch.randint(3, (20,), device=device)
    small_times = interleave({steps.BASELINE: _iterate(small, _sgd(small), x, y)}, rounds, clock=clock)
    monitoring = {
        "ResNet-18": _monitoring(model, times[steps.BASELINE], rounds, clock),
        "three layers of 32": _monitoring(small, small_times[steps.BASELINE], rounds, clock),
    }
    return _to_case("ResNet-18, whole iteration", dtype, "SGD", times, monitoring=monitoring)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), fused=True, **steps.OPTIMIZERS["SGD"])


def _iterate(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Call:
    def run() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

    return run


def _monitoring(model: nn.Module, iterations: list[float], rounds: int, clock: Clock) -> float:
    """Return the fraction that `Monitor` adds to the time of an iteration of a model that has gradients."""
    plain, recorded = _sgd(model), _sgd(model)
    Monitor(model, recorded, every=1)
    times = interleave({"plain": plain.step, "recorded": recorded.step}, rounds, clock=clock)
    record = statistics.median(b - a for a, b in zip(times["plain"], times["recorded"], strict=True))
    return record / (EVERY * statistics.median(iterations))


def _to_case(
    model: str, dtype: str, optimizer: str, times: dict[str, list[float]], centered: int = 0, **found: Any
) -> Case:
    """Summarize the times of all alternatives; ``found`` holds further fields of the case."""
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
        **found,
    )


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        body = [*_conv_norm(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *_conv_norm(outputs, outputs, 3)]
        self.body = nn.Sequential(*body)
        # An empty Sequential is the identity.
        self.shortcut = nn.Sequential(*(_conv_norm(inputs, outputs, 1, stride) if inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu_(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """Return ResNet-18 for small images: ``[n, 3, 32, 32]`` to ``[n, 10]``, 11.2 M parameters (He et al. 2016)."""
    layers = [*_conv_norm(3, 64, 3), nn.ReLU(inplace=True), _Block(64, 64, 1), _Block(64, 64, 1)]
    for channels in (64, 128, 256):
        layers += [_Block(channels, 2 * channels, 2), _Block(2 * channels, 2 * channels, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Describe the machine, its software and the kernels in use."""
    kernels = "; ".join(f"{name}: {reason or 'runs'}" for name, reason in unavailable_reasons().items())
    if not native.unavailable_reason() and not native.has_openmp():
        kernels += ", on one thread (built without OpenMP)"
    return {
        **(cuda.describe_gpu(device) if device.startswith("cuda") else {}),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradcentral": own_version(),
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
