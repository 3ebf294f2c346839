"""What is measured otherwise, or only, on a CUDA device: time by its own events, kernel launches, memory, graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcentral.bench.timing import Clock, Ratio, host_seconds, interleave, ratio

__all__ = ["DeviceFacts", "bandwidth", "clock_of", "copying", "describe", "facts", "launches", "peak_memory"]


@dataclass(frozen=True)
class DeviceFacts:
    """What steps do on a CUDA device besides taking time, by alternative."""

    launches: dict[str, int]
    """Kernels that a step launches, as the profiler counts them; copies and fills are none."""
    peak_bytes: dict[str, int]
    """Memory that a step takes while it runs, beyond what was there before it."""
    captured: Ratio | None = None
    """Our step replayed from a CUDA graph, over torch's fused step without GC replayed from one."""
    captured_milliseconds: dict[str, float] = field(default_factory=dict)


def clock_of(device: str) -> Clock:
    """What times calls on this device: the events of its stream, or the host's clock."""
    return _device_seconds if torch.device(device).type == "cuda" else host_seconds


def _device_seconds(run: Callable[[], object], count: int) -> float:
    start, end = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copying(tensors: Sequence[Tensor], touched: int) -> Callable[[], object]:
    """One copy on the tensors' device that reads and writes ``touched`` bytes together."""
    source = torch.empty(max(1, touched // 2), dtype=torch.uint8, device=tensors[0].device).zero_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 10, clock=clock_of(device))["copy"]
    return 2 * size / sorted(times)[len(times) // 2]


def describe(device: str) -> dict[str, str]:
    """The device and what its kernels are made with."""
    if torch.device(device).type != "cuda":
        return {}
    from importlib import metadata

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.L2_cache_size / 2**20:.0f} MiB of L2 cache",
        "CUDA": str(torch.version.cuda),
        "Triton": metadata.version("triton"),
        "device copy": f"{bandwidth(device) / 1e9:.0f} GB/s read and written",
    }


def facts(runs: dict[str, Callable[[], object]], ours: str, baseline: str, rounds: int, seconds: float) -> DeviceFacts:
    """Launches and memory of each alternative, and our step and the baseline replayed from CUDA graphs."""
    replays = {name: _captured(runs[name]) for name in (baseline, ours)}
    times = interleave(replays, rounds, seconds, clock=clock_of("cuda"))
    return DeviceFacts(
        {name: launches(run) for name, run in runs.items()},
        {name: peak_memory(run) for name, run in runs.items()},
        ratio(times[ours], times[baseline]),
        {name: sorted(found)[len(found) // 2] * 1e3 for name, found in times.items()},
    )


def launches(run: Callable[[], object]) -> int:
    """How many kernels one call launches; copies and fills of memory are none."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one call takes on the current device at most, beyond what was taken before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph that is replayed."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
