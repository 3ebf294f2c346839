"""CUDA-only measurements: kernel launches, peak memory and steps replayed from CUDA graphs."""

from __future__ import annotations

import statistics
from importlib import metadata
from typing import Any

import torch

from gradcentral.bench.timing import Call, clock_for, interleave, ratio

__all__ = ["capture", "copy_bytes", "describe_gpu", "measure"]


def copy_bytes(touched: int, device: str | torch.device) -> Call:
    """Return a call that copies on a device, reading and writing ``touched`` bytes in total."""
    source = torch.zeros(max(1, touched // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def describe_gpu(device: str) -> dict[str, str]:
    """Describe the GPU, its copy bandwidth and the versions of CUDA and Triton."""
    properties = torch.cuda.get_device_properties(device)
    touched = 1 << 31
    copies = interleave({"copy": copy_bytes(touched, device)}, 10, clock=clock_for(device))["copy"]
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.L2_cache_size / 2**20:.0f} MiB of L2 cache",
        "CUDA": str(torch.version.cuda),
        "Triton": metadata.version("triton"),
        "device copy": f"{touched / statistics.median(copies) / 1e9:.0f} GB/s read and written",
    }


def measure(runs: dict[str, Call], ours: str, baseline: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the launches and the memory of every alternative, and the times of two CUDA graphs."""
    replays = {name: capture(runs[name]) for name in (baseline, ours)}
    times = interleave(replays, rounds, seconds, clock=clock_for("cuda"))
    return {
        "launches": {name: _count_launches(run) for name, run in runs.items()},
        "peak_bytes": {name: _peak_memory(run) for name, run in runs.items()},
        "captured": ratio(times[ours], times[baseline]),
    }


def _count_launches(run: Call) -> int:
    from torch.profiler import DeviceType, ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    # torch repeats its own ranges, such as "Optimizer.step#AdamW.step", as events of the device.
    return sum(not event.name.startswith(("Memcpy", "Memset", "Optimizer.")) for event in events)


def _peak_memory(run: Call) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def capture(run: Call) -> Call:
    """Return a call that replays one call of ``run`` from a CUDA graph."""
    # torch requires warm-up calls on a side stream before capture.
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
