"""The benchmark: alternatives on the same tensors, paired rounds, real parameter shapes. No test depends on timing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from gradcentral import weight_layout
from gradcentral.bench import Benchmark, Case, bench
from gradcentral.bench.against import against_table, check_same_machine
from gradcentral.bench.benchmark import BENCH_DTYPES, resnet18
from gradcentral.bench.cuda import copy_bytes
from gradcentral.bench.report import NOISY, conclusion, markdown_table, plot_benchmark, short_table, terminal_table
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.steps import (
    ATTACHED,
    ATTACHED_UPDATE,
    BASELINE,
    OPTIMIZERS,
    OURS,
    OURS_UPDATE,
    TORCH_DEFAULT,
    optimizer_steps,
)
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
def test_shapes_are_those_of_the_published_models(model: str, tensors: int, elements: int) -> None:
    shapes = list(MODELS[model]())
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape, _ in shapes) == elements


def test_weight_vectors_of_dcgan_are_those_of_its_layers() -> None:
    sizes = [(100, 512, 1, 0), (512, 256, 2, 1), (256, 128, 2, 1), (128, 64, 2, 1), (64, 3, 2, 1)]
    with torch.device("meta"):
        model = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, s, p, bias=False) for i, o, s, p in sizes)
    layout = weight_layout(model)
    listed = [vectors for _, vectors in MODELS["DCGAN"]() if vectors is not None]
    assert [layout[p].pattern for p in model.parameters()] == [vectors.pattern for vectors in listed]
    assert [tuple(p.shape) for p in model.parameters()] == [vectors.shape for vectors in listed]


def test_resnet18_is_the_variant_for_small_images() -> None:
    with torch.device("meta"):
        model = resnet18()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_ratios_are_paired_by_round() -> None:
    """If the machine slows down halfway, both measurements of a round slow down."""
    found = ratio([2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_interleaving_rotates_the_order_of_the_alternatives() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=4, warm_up=0)  # type: ignore[misc]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    # One call each of a and b chooses the number of calls; the rounds are a b, b a, a b, b a.
    assert "".join(turns) == "abababa"


@pytest.mark.parametrize("algorithm", ["SGD", "AdamW"])
def test_alternatives_with_the_same_placement_take_the_same_step(algorithm: str) -> None:
    results: dict[str, torch.Tensor] = {}
    shapes = list(MODELS["tiny CNN"]())
    for name in optimizer_steps(shapes, algorithm, torch.float64):
        if name.startswith("streaming"):
            continue
        runs = optimizer_steps(shapes, algorithm, torch.float64)
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
    torch.testing.assert_close(results[OURS_UPDATE], results[ATTACHED_UPDATE])
    torch.testing.assert_close(results[TORCH_DEFAULT], results[BASELINE])
    assert not torch.allclose(results[OURS], results[BASELINE])
    assert results[OURS_UPDATE].mean((1, 2, 3)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("parameter", "known"),
    [("models", MODELS), ("optimizers", OPTIMIZERS), ("dtypes", BENCH_DTYPES), ("device", ("cpu", "cuda"))],
)
def test_an_unknown_name_is_rejected_with_the_valid_choices(parameter: str, known: Collection[str]) -> None:
    names = "mps" if parameter == "device" else ["ResNet-51"]
    with pytest.raises(ValueError, match=rf"{parameter}: unknown .* '[\w-]+'; choose from ") as caught:
        bench(**{parameter: names})  # type: ignore[arg-type]
    assert str(caught.value).partition("; choose from ")[2].split(", ") == list(known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_cuda_device_is_reported_with_the_option_that_works(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    found = re.search(r"no CUDA device; use (--device \w+)", run.output)
    assert found is not None
    arguments = ["--models", "tiny CNN", "--optimizers", "SGD", "--dtypes", "f32", "--rounds", "3", "--no-iteration"]
    run = CliRunner().invoke(app, ["bench", *found[1].split(), *arguments, "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output


def test_missing_peers_are_reported_with_a_package_that_provides_them() -> None:
    try:
        package = metadata.version("pytorch-optimizer")
    except metadata.PackageNotFoundError:
        with pytest.raises(ValueError, match="pip install 'pytorch-optimizer>=4.1'"):
            next(bench(["tiny CNN"], peers=True))
    else:
        case = next(bench(["tiny CNN"], ["SGD"], ["f32"], rounds=3, peers=True))
        assert "pytorch_optimizer + torch fused" in case.ratios, package


def test_a_custom_clock_times_every_measurement() -> None:
    counted: list[int] = []

    def clock(run: Callable[[], object], count: int) -> float:
        counted.append(count)
        run()
        return count * 1e-3

    times = interleave({"a": lambda: None}, rounds=3, warm_up=0, clock=clock)
    assert counted == [1, 2, 2, 2]  # at least two milliseconds per measurement
    assert times == {"a": [1e-3] * 3}


def test_a_copy_touches_the_requested_number_of_bytes() -> None:
    target = copy_bytes(4096, "cpu")()
    assert isinstance(target, torch.Tensor)
    assert 2 * target.nbytes == 4096


def _case(ours: Ratio, noise: float) -> Case:
    return Case("tiny CNN", "f32", "SGD", 1.0, {OURS: ours}, noise)


def test_a_noisy_machine_gives_no_conclusion() -> None:
    faster, slower = _case(Ratio(0.8, 0.7, 0.9), 0.02), _case(Ratio(1.2, 1.1, 1.3), 0.02)
    text = conclusion(Benchmark([faster, slower]))
    assert "faster than torch fused, no GC in 1 of 2 cases, slower in 1" in text
    assert "tiny CNN f32 SGD 1.20" in text
    assert conclusion(Benchmark([_case(Ratio(0.8, 0.7, 0.9), 2 * NOISY)])).startswith("Too noisy to tell")


def test_tables_and_plot() -> None:
    benchmark = Benchmark([_case(Ratio(0.8, 0.7, 0.9), 0.02)], {"threads": "2"})
    assert terminal_table(benchmark).row_count == 1
    assert short_table(benchmark).row_count == 1
    assert "| tiny CNN | f32 | SGD | 1.00 | – | – | – | **0.80** | – | – | ±2% |" in markdown_table(benchmark)
    assert plot_benchmark(benchmark).startswith(b"\x89PNG")


def test_the_command_writes_its_results(tmp_path: Path) -> None:
    arguments = ["bench", "--models", "tiny CNN", "--optimizers", "SGD", "--dtypes", "f32", "--rounds", "3"]
    run = CliRunner().invoke(app, [*arguments, "--seconds", "0.5", "--no-iteration", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [case["model"] for case in written["cases"]] == ["tiny CNN"]
    assert OURS in written["cases"][0]["ratios"]
    assert "kernels" in written["machine"]
    assert (tmp_path / "bench.md").read_text(encoding="utf-8").count("\n") == 3
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_short_table_marks_the_slowest_case_and_fits_100_columns() -> None:
    ratios = {("f32", "SGD"): 0.8, ("f32", "AdamW"): 1.25, ("bf16", "SGD"): 1.1, ("bf16", "AdamW"): 0.9}
    cases = [
        Case(model, dtype, algorithm, 1.0, {OURS: Ratio(found, found, found + (model == "DCGAN") / 100)}, 0.01)
        for model in MODELS
        for (dtype, algorithm), found in ratios.items()
    ]
    console = Console(width=100, record=True, file=StringIO())
    console.print(short_table(Benchmark(cases[:-1])))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(any(model in line for model in MODELS) for line in lines) == len(MODELS)
    assert [line.split()[1] for line in lines if "1.25 ◀" in line] == ["ResNet-50"]
    assert "–" in lines[-2]


def test_an_earlier_benchmark_is_compared_case_by_case(tmp_path: Path) -> None:
    before = Benchmark([_case(Ratio(1.0, 0.95, 1.05), 0.02)], {"processor": "P", "threads": "2"})
    (tmp_path / "bench.json").write_text(before.to_json(), encoding="utf-8")
    earlier = Benchmark.read(tmp_path / "bench.json")
    assert earlier == before
    slower, same = _case(Ratio(1.2, 1.1, 1.3), 0.02), _case(Ratio(1.04, 1.0, 1.1), 0.02)
    new = Case("DCGAN", "f32", "SGD", 1.0, {OURS: Ratio(1, 1, 1)}, 0.02)
    console = Console(width=100, record=True, file=StringIO())
    console.print(against_table(Benchmark([slower, same, new]), earlier))
    text = console.export_text()
    assert "1.00 → 1.20 │ slower +20%" in text
    assert re.search(r"1\.00 → 1\.04 │\s+\+4%", text)
    assert re.search(r"1\.00 │\s+new", text)
    with pytest.raises(ValueError, match="threads '2', this one '4': compare benchmarks of the same machine"):
        check_same_machine({"processor": "P", "threads": "4"}, earlier.machine)


def test_the_command_compares_with_its_own_file_and_refuses_others(tmp_path: Path) -> None:
    arguments = ["bench", "--models", "tiny CNN", "--optimizers", "SGD", "--dtypes", "f32", "--rounds", "3"]
    arguments += ["--seconds", "0.3", "--no-iteration", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    run = CliRunner().invoke(app, [*arguments, "--all", "--against", str(tmp_path / "bench.json")])
    assert run.exit_code == 0, run.output
    assert "earlier and now" in run.output
    (tmp_path / "bench.json").write_text("[1]", encoding="utf-8")
    for file, reason in (("bench.json", "is not a bench.json"), ("missing.json", "cannot be read")):
        run = CliRunner().invoke(app, [*arguments, "--against", str(tmp_path / file)])
        assert run.exit_code == 2
        assert reason in run.output
