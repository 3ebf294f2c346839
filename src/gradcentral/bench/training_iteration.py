"""A whole training iteration of ResNet-18 with and without GC, and what `Monitor` adds to it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradcentral.attach import centralize
from gradcentral.bench.benchmark import BENCH_DTYPES, Case, to_case
from gradcentral.bench.steps import ATTACHED, BASELINE, BASELINE_AGAIN, OPTIMIZERS, OURS
from gradcentral.bench.timing import Clock, clock_for, interleave
from gradcentral.diagnostics.monitor import EVERY, Monitor
from gradcentral.optim import SGD

__all__ = ["iteration", "resnet18"]


def iteration(
    *, rounds: int = 8, seconds: float = 120.0, batch: int = 128, device: str = "cpu", dtype: str = "f32"
) -> Case:
    """Measure a training iteration of ResNet-18 on 32×32 images: forward, backward and step.

    `Monitor` adds less than the noise of an iteration. Its cost is therefore computed: the time of one record over that
    of the iterations between two records. It is largest for small networks, so a network of three small layers is
    measured too.
    """
    place, clock = (torch.device(device), BENCH_DTYPES[dtype]), clock_for(device)
    model = resnet18().to(*place)
    x, y = torch.randn(batch, 3, 32, 32).to(*place), torch.randint(10, (batch,)).to(device)
    hooked, plain, monitored = _sgd(model), _sgd(model), _sgd(model)
    centralize(hooked, model)
    Monitor(model, monitored)
    runs = {
        BASELINE: _iterate(model, plain, x, y),
        BASELINE_AGAIN: _iterate(model, plain, x, y),
        ATTACHED: _iterate(model, hooked, x, y),
        OURS: _iterate(model, SGD(model, **OPTIMIZERS["SGD"]), x, y),
        "Monitor + torch fused": _iterate(model, monitored, x, y),
    }
    times = interleave(runs, rounds, seconds, warm_up=1, clock=clock)
    small = nn.Sequential(nn.Linear(13, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 3)).to(*place)
    x, y = torch.randn(20, 13).to(*place), torch.randint(3, (20,)).to(device)
    small_times = interleave({BASELINE: _iterate(small, _sgd(small), x, y)}, rounds, clock=clock)
    monitoring = {
        "ResNet-18": _monitoring(model, times[BASELINE], rounds, clock),
        "three layers of 32": _monitoring(small, small_times[BASELINE], rounds, clock),
    }
    return replace(to_case("ResNet-18, whole iteration", dtype, "SGD", times), monitoring=monitoring)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), fused=True, **OPTIMIZERS["SGD"])


def _iterate(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

    return run


def _monitoring(model: nn.Module, iterations: list[float], rounds: int, clock: Clock) -> float:
    """The fraction that `Monitor` adds to iterations of a model that has gradients."""
    plain, recorded = _sgd(model), _sgd(model)
    Monitor(model, recorded, every=1)
    times = interleave({"plain": plain.step, "recorded": recorded.step}, rounds, clock=clock)
    record = statistics.median(b - a for a, b in zip(times["plain"], times["recorded"], strict=True))
    return record / (EVERY * statistics.median(iterations))


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        body = [*_conv_norm(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *_conv_norm(outputs, outputs, 3)]
        self.body = nn.Sequential(*body)
        # Without layers it is the identity.
        self.shortcut = nn.Sequential(*(_conv_norm(inputs, outputs, 1, stride) if inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu_(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """Return ResNet-18 for small images: ``[n, 3, 32, 32]`` to ``[n, 10]``, 11.2 M parameters (He et al. 2016)."""
    layers = [*_conv_norm(3, 64, 3), nn.ReLU(inplace=True), _Block(64, 64, 1), _Block(64, 64, 1)]
    for channels in (64, 128, 256):
        layers += [_Block(channels, 2 * channels, 2), _Block(2 * channels, 2 * channels, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
