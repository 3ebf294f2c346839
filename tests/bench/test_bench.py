"""The benchmark measures what it says: same tensors, paired rounds, known models. No test looks at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gradcentral.bench import Benchmark, Case, bench
from gradcentral.bench.device import copying
from gradcentral.bench.network import resnet18
from gradcentral.bench.runs import NOISY
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.steps import ATTACHED, BASELINE, OURS, alternatives
from gradcentral.bench.table import markdown, plot, table, verdict
from gradcentral.bench.timing import Ratio, interleave, ratio
from gradcentral.cli.main import app


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("ViT-S", 152, 22_050_664),
        ("MobileNetV2", 158, 3_504_872),
        ("GPT-2", 148, 124_439_808),
        ("4096×11008", 1, 45_088_768),
    ],
)
def test_shapes_are_the_models(model: str, tensors: int, elements: int) -> None:
    shapes = list(MODELS[model]())
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape, _ in shapes) == elements


def test_resnet18_is_the_one_for_small_images() -> None:
    with torch.device("meta"):
        model = resnet18()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down in the middle slows both of a round."""
    found = ratio([2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_interleaving_runs_everything_equally_often_in_turns() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=4, warm_up=0)  # type: ignore[misc]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    # To find how often, a and b; then a b, b a, a b, b a.
    assert "".join(turns) == "abababa"


@pytest.mark.parametrize("algorithm", ["SGD", "AdamW"])
def test_every_alternative_takes_the_same_step(algorithm: str) -> None:
    """Those with GC give one result, those without another, from the same start."""
    results: dict[str, torch.Tensor] = {}
    shapes = list(MODELS["tiny CNN"]())
    for name in alternatives(shapes, algorithm, torch.float64):
        if name.startswith("streaming"):
            continue
        runs = alternatives(shapes, algorithm, torch.float64)
        optimizer = getattr(runs[name], "__self__", None)
        if optimizer is None:
            continue
        p = optimizer.param_groups[0]["params"][0]
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        before = p.detach().clone()
        runs[name]()
        results[name] = p.detach() - before
    assert len(results) >= 6
    torch.testing.assert_close(results[OURS], results[ATTACHED])
    torch.testing.assert_close(results["gradcentral update"], results["centralize update + torch fused"])
    torch.testing.assert_close(results["torch default, no GC"], results[BASELINE])
    assert not torch.allclose(results[OURS], results[BASELINE])
    assert results["gradcentral update"].mean((1, 2, 3)).abs().max() < 1e-12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="models: 'ResNet-51' is unknown; there are ResNet-50"):
        next(bench(["ResNet-51"]))
    with pytest.raises(ValueError, match="dtypes: 'f8' is unknown"):
        next(bench(dtypes=["f8"]))


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="device: 'mps' is unknown"):
        next(bench(["tiny CNN"], device="mps"))
    if not torch.cuda.is_available():
        run = CliRunner().invoke(app, ["bench", "--device", "cuda"])
        assert "no CUDA device" in str(run.exception)


def test_a_clock_of_ones_own_times_every_call() -> None:
    """As the events of a device do."""
    counted: list[int] = []

    def clock(run: Callable[[], object], count: int) -> float:
        counted.append(count)
        run()
        return count * 1e-3

    times = interleave({"a": lambda: None}, rounds=3, warm_up=0, clock=clock)
    assert counted == [1, 2, 2, 2]  # two milliseconds at least for one measurement
    assert times == {"a": [1e-3] * 3}


def test_copying_touches_as_many_bytes_as_said() -> None:
    run = copying([torch.zeros(1)], 4096)
    target = run()
    assert isinstance(target, torch.Tensor)
    assert 2 * target.nbytes == 4096


def _case(ours: Ratio, noise: float) -> Case:
    return Case("tiny CNN", "f32", "SGD", 1.0, {OURS: ours}, noise)


def test_the_verdict_says_when_it_cannot_tell() -> None:
    faster, slower = _case(Ratio(0.8, 0.7, 0.9), 0.02), _case(Ratio(1.2, 1.1, 1.3), 0.02)
    text = verdict(Benchmark([faster, slower]))
    assert "faster than torch fused, no GC in 1 of 2 cases, slower in 1" in text
    assert "tiny CNN f32 SGD 1.20" in text
    assert verdict(Benchmark([_case(Ratio(0.8, 0.7, 0.9), 2 * NOISY)])).startswith("Too noisy to tell")


def test_table_and_plot(tmp_path: Path) -> None:
    benchmark = Benchmark([_case(Ratio(0.8, 0.7, 0.9), 0.02)], {"threads": "2"})
    assert table(benchmark).row_count == 1
    assert "| tiny CNN | f32 | SGD | 1.00 | – | – | – | **0.80** | – | – | ±2% |" in markdown(benchmark)
    plot(benchmark, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_command_line(tmp_path: Path) -> None:
    arguments = ["bench", "--models", "tiny CNN", "--optimizers", "SGD", "--dtypes", "f32", "--rounds", "3"]
    run = CliRunner().invoke(app, [*arguments, "--seconds", "0.5", "--no-iteration", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [case["model"] for case in written["cases"]] == ["tiny CNN"]
    assert OURS in written["cases"][0]["ratios"]
    assert "kernels" in written["machine"]
