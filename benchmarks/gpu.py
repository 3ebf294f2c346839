"""Run all measurements that need a CUDA device, in less than ten minutes.

    python benchmarks/gpu.py --out DIR              needs a CUDA device, a CUDA build of torch, Triton and pytest
    python benchmarks/gpu.py --out DIR --dry-run    runs small models on the CPU, to test the script itself

The script runs the kernel tests on the device, then measures optimizer steps with and without GC like `gradcentral
bench --device cuda` (with CUDA events, kernel launches, peak memory and steps replayed from CUDA graphs), a bf16
training iteration of ResNet-18, and the effect of the kernel's settings on its time. It updates gpu.md, gpu.json,
bench.md, bench.json and tests.txt after every result. If one part fails, it reports the failure and runs the next part.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]

# The most important models first, because the time limit cuts off the last ones.
MODELS = ("ResNet-50", "GPT-2", "4096×11008", "ViT-S", "MobileNetV2", "tiny CNN", "DCGAN")
WORKERS = 14
"""Processes that compile at the same time."""

# Values to try for the kernel's settings, each alone.
VALUES = {"WARPS": (2, 8), "REGISTERS": (48, 80, 96), "PIECE": (2048, 8192), "LONGEST": (1 << 16, 1 << 18)}
SETTINGS = [{}, *({name: value} for name in VALUES for value in VALUES[name]), {"TILE": 512}, {"SEGMENT": 512}]


class Run:
    """The results so far and the remaining time."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.device = "cpu" if dry else "cuda"
        self.end = time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {"complete": False, "dry run": dry}
        self.lines: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Remaining time in seconds."""
        return self.end - time.monotonic()

    def part(self, name: str, do: Callable[[Run], Any]) -> None:
        started = time.monotonic()
        print(f"== {name} ({self.left:.0f} s left)", flush=True)
        try:
            self.results[name] = do(self)
        except Exception:
            self.results[name] = {"failed": traceback.format_exc()}
            self.report(f"**{name} failed**: {traceback.format_exc().splitlines()[-1]}")
        self.results[name + ", seconds"] = round(time.monotonic() - started, 1)
        self.write()

    def report(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)
        (self.out / "gpu.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def write(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1, default=str) + "\n", encoding="utf-8")


def tests(run: Run) -> Any:
    """Run the kernel tests on the device; in a dry run, some of them in Triton's interpreter."""
    files = ["tests/kernels/test_triton.py", "tests/kernels/test_triton_division.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="]
    options += ["--durations=5"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling variants of the kernel
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    if run.dry:
        environment |= {"TRITON_INTERPRET": "1", "GRADCENTRAL_KERNELS": "triton"}
        options += ["-k", "one_launch or plain_dense or tiles_fit"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    limit = max(30.0, min(200.0, run.left))
    log = run.out / "tests.txt"
    with log.open("w", encoding="utf-8") as output:  # a file keeps what was printed before a timeout
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False
        )
    last = [line for line in log.read_text(encoding="utf-8").splitlines() if line][-1:]
    run.report(f"Tests on the device: {' '.join(last)} (exit code {done.returncode})\n")
    return {"exit code": done.returncode, "summary": last}


def steps(run: Run) -> Any:
    """Measure the optimizer steps of every model, type and optimizer; print each case once it is measured."""
    from gradcentral.bench import Benchmark, bench, describe_machine
    from gradcentral.bench.report import conclusion, markdown_table
    from gradcentral.bench.steps import BASELINE, OURS

    benchmark = Benchmark(machine=describe_machine(run.device))
    models, dtypes = (["tiny CNN"], ["f32"]) if run.dry else (MODELS, ["f32", "bf16"])
    how: dict[str, Any] = {"rounds": 3, "seconds": 0.5} if run.dry else {"rounds": 30, "seconds": 1.0}
    failed: dict[str, str] = {}
    for model, dtype, algorithm in itertools.product(models, dtypes, ("SGD", "AdamW")):
        name = f"{model} {dtype} {algorithm}"
        if run.left < 60 and not run.dry:
            failed[name] = "no time left"
            continue
        try:
            case = next(bench([model], [algorithm], [dtype], device=run.device, **how))
        except Exception:
            failed[name] = traceback.format_exc()
            continue
        benchmark.cases.append(case)
        (run.out / "bench.json").write_text(benchmark.to_json(), encoding="utf-8")
        (run.out / "bench.md").write_text(markdown_table(benchmark), encoding="utf-8")
        line = f"- {name}: {case.milliseconds:.3f} ms, with GC ÷ without {case.ratios[OURS]}"
        if not run.dry:
            line += f", captured {case.captured}; launches {case.launches[BASELINE]} → {case.launches[OURS]}"
            line += f"; peak {case.peak_bytes[OURS] / 1e6:.1f} MB"
        run.report(line)
    if benchmark.cases:
        run.report(f"\n{markdown_table(benchmark)}\n{conclusion(benchmark)}\n")
    for name, reason in failed.items():
        run.report(f"Not measured: {name}: {reason.splitlines()[-1]}")
    return {"machine": benchmark.machine, "cases": [asdict(case) for case in benchmark.cases], "failed": failed}


def iteration(run: Run) -> Any:
    """Measure a training iteration of ResNet-18 in bf16; in a dry run, with two images in f32."""
    from gradcentral.bench import iteration as measure

    dry: dict[str, Any] = {"rounds": 2, "batch": 2}
    case = measure(device=run.device, **(dry if run.dry else {"rounds": 20, "seconds": 8.0, "dtype": "bf16"}))
    ratios = ", ".join(f"{name} {found}" for name, found in case.ratios.items())
    run.report(
        f"ResNet-18 iteration, {case.dtype}: {case.milliseconds:.2f} ms; ÷ that: {ratios}; noise ±{case.noise:.0%}\n"
    )
    return asdict(case)


def host(run: Run) -> Any:
    """Measure the time that a step takes the host, which does not wait for the device."""
    from gradcentral.bench.shapes import MODELS as SHAPES
    from gradcentral.bench.steps import ATTACHED, BASELINE, LOOP, OURS, TORCH_DEFAULT, optimizer_steps

    found: dict[str, float] = {}
    for model, algorithm in itertools.product(["tiny CNN"] if run.dry else ["ResNet-50", "tiny CNN"], ("SGD", "AdamW")):
        runs = optimizer_steps(SHAPES[model](), algorithm, torch.float32, run.device)
        for name in (BASELINE, TORCH_DEFAULT, LOOP, ATTACHED, OURS):
            times = []
            for _ in range(20):
                if not run.dry:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                runs[name]()
                times.append(time.perf_counter() - started)
            found[f"{model} {algorithm} {name}"] = microseconds = 1e6 * statistics.median(times)
            run.report(f"- host, {model} {algorithm}, {name}: {microseconds:.0f} µs")
    return found


def variant(model: str, algorithm: str, dtype: str, device: str, setting: dict[str, int]) -> dict[str, Any]:
    """Return the steps of a model with other settings of the kernel, after the first step, which compiles it."""
    from gradcentral.bench.benchmark import BENCH_DTYPES
    from gradcentral.bench.shapes import MODELS as SHAPES
    from gradcentral.bench.steps import BASELINE, OURS, OURS_UPDATE, optimizer_steps
    from gradcentral.kernels.triton import division, plans

    with ExitStack() as changed:
        for module, name in itertools.product((division, plans), setting):
            if hasattr(module, name):
                changed.enter_context(mock.patch.object(module, name, setting[name]))
        runs = optimizer_steps(SHAPES[model](), algorithm, BENCH_DTYPES[dtype], device)
        for name in (OURS, OURS_UPDATE):
            runs[name]()
    return {name: runs[name] for name in (BASELINE, OURS, OURS_UPDATE)}


def compile_variant(arguments: tuple[Any, ...]) -> None:
    """Compile a variant in a process of its own, into Triton's cache."""
    sys.path.insert(0, str(ROOT / "src"))
    variant(*arguments)


def settings(run: Run) -> Any:
    """Measure the time of captured GC steps relative to torch's fused step for several settings of the kernel."""
    from gradcentral.bench.cuda import capture
    from gradcentral.bench.steps import BASELINE
    from gradcentral.bench.timing import clock_for, interleave, ratio

    cases = [("tiny CNN", "SGD")] if run.dry else [("ResNet-50", "AdamW"), ("GPT-2", "SGD"), ("ViT-S", "SGD")]
    dtypes = ["f32"] if run.dry else ["f32", "bf16"]
    variants = [(*case, dtype, run.device, s) for s, case, dtype in itertools.product(SETTINGS, cases, dtypes)]
    if not run.dry:
        with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
            list(pool.map(compile_variant, variants))
        run.report(f"Compiled {len(variants)} variants; {run.left:.0f} s left\n")
    found: dict[str, float] = {}
    for arguments in variants:
        if run.left < 10 and not run.dry:
            break
        model, algorithm, dtype, device, setting = arguments
        runs = variant(*arguments)
        if not run.dry:
            runs = {name: capture(call) for name, call in runs.items()}
        times = interleave(runs, 10, 0.3, clock=clock_for(device))
        for name, took in times.items():
            if name != BASELINE:
                against = ratio(took, times[BASELINE])
                found[f"{model} {dtype} {algorithm} {setting} {name}"] = against.median
                run.report(f"- {model} {dtype} {algorithm}, {name}, {setting or 'default settings'}: {against}")
    return found


def main() -> None:
    """Parse the arguments and run every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="run small models on the CPU, to test the script")
    parts = {part.__name__: part for part in (tests, steps, host, iteration, settings)}
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts], help="parts to run; by default all")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    run = Run(arguments.out, arguments.minutes, arguments.dry_run)
    if not run.dry and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --dry-run tests the script without one")
    for name in arguments.parts:
        run.part(name, parts[name])
    run.results["complete"] = True
    run.write()
    print(f"{arguments.out / 'gpu.md'}, bench.md and tests.txt")


if __name__ == "__main__":
    main()
