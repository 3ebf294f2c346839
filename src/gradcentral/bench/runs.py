"""What `gradcentral bench` measures, and what it says of it."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradcentral
from gradcentral.bench.device import DeviceFacts, clock_of, describe, facts
from gradcentral.bench.network import resnet18
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.steps import ALGORITHMS, ATTACHED, BASELINE, OURS, STREAM, STREAM_GRADIENTS, alternatives
from gradcentral.bench.timing import Clock, Ratio, interleave, ratio
from gradcentral.diagnostics.monitor import EVERY, Monitor
from gradcentral.kernels import native, unavailable_reasons

__all__ = ["DTYPES", "Benchmark", "Case", "bench", "iteration"]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
MONITORED = "Monitor + torch fused"
NOISY = 0.10
"""When a step differs from itself by more than this, the machine is too noisy for the ratios to mean anything."""


@dataclass(frozen=True)
class Case:
    """One model, type and algorithm: every alternative's time over that of torch's fused step without GC."""

    model: str
    dtype: str
    algorithm: str
    milliseconds: float
    """Median of the baseline."""
    ratios: dict[str, Ratio]
    noise: float
    """How much the baseline differed from itself: the half distance of the quartiles and of their middle from 1."""
    over_streaming: Ratio | None = None
    """Ours over reading and writing the same bytes."""
    attaching: Ratio | None = None
    """What `centralize` adds, over reading and writing the gradients once."""
    attaching_us: float | None = None
    """… and in microseconds for each centered parameter."""
    on_device: DeviceFacts | None = None
    """Of a CUDA device."""
    monitoring: dict[str, float] = field(default_factory=dict)
    """What `Monitor` adds to an iteration at its default interval, by network: a record's time over that of so many."""


@dataclass
class Benchmark:
    """All cases of one call, and where they were measured."""

    cases: list[Case] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """The median over the cases of how much the baseline differed from itself."""
        return statistics.median(case.noise for case in self.cases) if self.cases else 0.0

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": self.machine, "cases": [asdict(case) for case in self.cases]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def bench(
    models: Sequence[str] = tuple(MODELS),
    algorithms: Sequence[str] = tuple(ALGORITHMS),
    dtypes: Sequence[str] = tuple(DTYPES),
    *,
    rounds: int = 60,
    seconds: float = 12.0,
    peers: bool = False,
    device: str = "cpu",
) -> Iterator[Case]:
    """Measure the optimizer steps of models, one case after another.

    Args:
        models, algorithms, dtypes: names, of `MODELS`, `ALGORITHMS` and `DTYPES`.
        rounds: how often each alternative is timed, at most.
        seconds: how long a case may take.
        peers: also other libraries' GC.
        device: where, as torch names it.

    Raises:
        ValueError: a name is unknown.
    """
    for what, chosen, known in (
        ("models", models, MODELS),
        ("optimizers", algorithms, ALGORITHMS),
        ("dtypes", dtypes, DTYPES),
    ):
        for name in chosen:
            if name not in known:
                raise ValueError(f"{what}: {name!r} is unknown; there are {', '.join(known)}")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} is unknown; there are cpu and cuda")
    for model in models:
        for dtype in dtypes:
            for algorithm in algorithms:
                shapes = list(MODELS[model]())
                runs = alternatives(shapes, algorithm, DTYPES[dtype], device, peers=peers)
                times = interleave(runs, rounds, seconds, clock=clock_of(device))
                centered = sum(vectors is not None for _, vectors in shapes)
                case = _case(model, dtype, algorithm, times, centered)
                if device != "cpu":
                    steps = {name: run for name, run in runs.items() if name not in (STREAM, STREAM_GRADIENTS)}
                    case = replace(case, on_device=facts(steps, OURS, BASELINE, rounds, seconds / 4))
                yield case


def iteration(
    *, rounds: int = 8, seconds: float = 120.0, batch: int = 128, device: str = "cpu", dtype: str = "f32"
) -> Case:
    """A whole training iteration of ResNet-18 on 32×32 images: forward, backward and step.

    With and without GC, and with `Monitor`. What a monitor adds is less than the noise of an iteration, so that the
    time of a record, which can be measured, is divided by that of the iterations that it comes in. The
    smaller the network, the more it is: it is measured on three small layers, too.
    """
    x, y = torch.randn(batch, 3, 32, 32).to(device, DTYPES[dtype]), torch.randint(10, (batch,)).to(device)
    model = resnet18().to(device, DTYPES[dtype])

    def training(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        return _iteration(model, optimizer, x, y)

    # One model for all, so that nothing but the optimizer differs; the rate is too small to change it.
    options: dict[str, Any] = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4}
    hooked = torch.optim.SGD(model.parameters(), fused=True, **options)
    gradcentral.centralize(hooked, model)
    plain = torch.optim.SGD(model.parameters(), fused=True, **options)
    watched = torch.optim.SGD(model.parameters(), fused=True, **options)
    Monitor(model, watched)
    runs = {
        BASELINE: training(plain),
        f"{BASELINE}, again": training(plain),
        ATTACHED: training(hooked),
        OURS: training(gradcentral.SGD(model, **options)),
        MONITORED: training(watched),
    }
    clock = clock_of(device)
    times = interleave(runs, rounds, seconds, warm_up=1, clock=clock)
    case = _case("ResNet-18, whole iteration", dtype, "SGD", times, 0)
    record = _record_seconds(model, options, rounds, clock)
    monitoring = {
        "ResNet-18": record / (EVERY * case.milliseconds * 1e-3),
        "three layers of 32": _small_network(options, rounds, clock, device, DTYPES[dtype]),
    }
    return replace(case, monitoring=monitoring)


def _iteration(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()

    return run


def _record_seconds(model: nn.Module, options: dict[str, Any], rounds: int, clock: Clock) -> float:
    """What a step takes longer when it is recorded; the model has its gradients."""
    plain = torch.optim.SGD(model.parameters(), fused=True, **options)
    recorded = torch.optim.SGD(model.parameters(), fused=True, **options)
    Monitor(model, recorded, every=1)
    times = interleave({"plain": plain.step, "recorded": recorded.step}, rounds, clock=clock)
    return statistics.median(b - a for a, b in zip(times["plain"], times["recorded"], strict=True))


def _small_network(
    options: dict[str, Any], rounds: int, clock: Clock, device: str, dtype: torch.dtype, batch: int = 20
) -> float:
    """What monitoring adds to an iteration that takes less than a millisecond."""
    layers = [nn.Linear(13, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 3)]
    model = nn.Sequential(*layers).to(device, dtype)
    x, y = torch.randn(batch, 13).to(device, dtype), torch.randint(3, (batch,)).to(device)
    run = _iteration(model, torch.optim.SGD(model.parameters(), fused=True, **options), x, y)
    seconds = statistics.median(interleave({"iteration": run}, rounds, clock=clock)["iteration"])
    return _record_seconds(model, options, rounds, clock) / (EVERY * seconds)


def _case(model: str, dtype: str, algorithm: str, times: dict[str, list[float]], centered: int) -> Case:
    base = times[BASELINE]
    ratios = {name: ratio(seconds, base) for name, seconds in times.items() if name != BASELINE}
    again = ratios.pop(f"{BASELINE}, again")
    noise = max(abs(math.log(again.median)), abs(again.high - again.low) / 2)
    over_streaming = attaching = attaching_us = None
    ratios = {name: found for name, found in ratios.items() if name not in (STREAM, STREAM_GRADIENTS)}
    if STREAM in times:
        over_streaming = ratio(times[OURS], times[STREAM])
    if centered:
        added = [hooked - plain for hooked, plain in zip(times[ATTACHED], base, strict=True)]
        attaching_us = statistics.median(added) * 1e6 / centered
        if STREAM_GRADIENTS in times:
            attaching = ratio(added, times[STREAM_GRADIENTS])
    return Case(
        model,
        dtype,
        algorithm,
        statistics.median(base) * 1e3,
        ratios,
        noise,
        over_streaming,
        attaching,
        attaching_us,
    )


def machine(device: str = "cpu") -> dict[str, str]:
    """Where it was measured."""
    return {
        **describe(device),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradcentral": gradcentral.__version__,
        "kernels": "; ".join(f"{name}: {why or 'runs'}" for name, why in unavailable_reasons().items()) + _one_thread(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _one_thread() -> str:
    return "" if unavailable_reasons()["native"] or native.has_openmp() else ", on one thread (built without OpenMP)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        values = {key.strip(): value.strip() for key, value in facts.items()}
        name = values["model name"]
        family = f"family {values['cpu family']} model {values['model']}" if "cpu family" in values else ""
        return f"{name} {family}".strip() + f", {os.cpu_count()} cores"
    except (OSError, KeyError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
