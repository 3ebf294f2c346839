"""The native kernels: exactness, determinism, the division of the work, and the fallback to the reference path."""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys
import types
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import gradcentral
from gradcentral import WeightLayout, WeightVectors, center
from gradcentral.kernels import Centering, native, unavailable_reasons
from gradcentral.kernels.forms import Coefficients, UpdateRule
from gradcentral.kernels.loops import Loop, loop_of_vectors
from gradcentral.kernels.planner import loop_of
from tests.strategies import Case, cases

SERVED = (torch.float64, torch.float32, torch.bfloat16)
ROWS, COLUMNS = WeightVectors((1,)), WeightVectors((0,))

pytestmark = pytest.mark.skipif(
    bool(native.unavailable_reason()),
    reason=f"needs the native kernels ({native.unavailable_reason()}): install with a C compiler",
)


@pytest.fixture
def threads() -> Iterator[Any]:
    """Return a function that sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(drawn=st.lists(cases((*SERVED, torch.float16, torch.complex64), expanded=False), min_size=1, max_size=4))
def test_centering_equals_the_reference(drawn: list[Case]) -> None:
    """Strides and dtypes are mixed; the reference path centers tensors that the kernels do not support."""
    expected = [center(*case) for case in drawn]
    Centering().center_all_([(case.tensor, case.vectors) for case in drawn])
    for case, reference in zip(drawn, expected, strict=True):
        rounding = torch.finfo(case.tensor.dtype).eps * float(case.tensor.abs().max() + 1)
        torch.testing.assert_close(case.tensor, reference, rtol=0, atol=4 * rounding)


@given(drawn=st.lists(cases(SERVED, expanded=False), min_size=1, max_size=3))
def test_restoring_means_shifts_each_weight_vector(drawn: list[Case]) -> None:
    pairs = [(case.tensor, case.vectors) for case in drawn]
    expected = [
        (t + 0.25).to(t.dtype) - (center_means((t + 0.25).to(t.dtype), v) - center_means(t, v)).to(t.dtype)
        for t, v in pairs
    ]
    centering = Centering()
    means = centering.means(pairs)
    for tensor, _ in pairs:
        tensor.add_(0.25)
    centering.restore_(pairs, means)
    for (tensor, _), reference in zip(pairs, expected, strict=True):
        atol = 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max() + 1)
        torch.testing.assert_close(tensor, reference, rtol=0, atol=atol)


def center_means(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    """Return, at each element, the mean of its weight vector."""
    return tensor.double() - center(tensor.double(), vectors)


# A transposed convolution with kernel 4 and stride 2.
PHASES = WeightVectors.parse("[i] o ([m] 2) ([m] 2)", (300, 120, 4, 4))

# Large enough for every path through the kernels: several pieces, blocks and waves; odd widths; runs of taps.
LARGE = [
    ((3, 700_001), ROWS),
    ((40_000, 9), ROWS),
    ((701, 27), ROWS),
    ((7, 5001), ROWS),
    ((1030, 1031), COLUMNS),
    ((4000, 1100), COLUMNS),
    ((700, 2), COLUMNS),
    ((3, 400_001), COLUMNS),
    ((128, 65, 5, 5), WeightVectors((0, 2, 3))),
    ((64, 3, 47, 47), WeightVectors((0, 2, 3))),
    ((96, 40, 3, 3), WeightVectors((1, 3, 4), view=(3, 32, 40, 3, 3))),
    # Phases: with several blocks, with as many groups as channels, in three axes, in memory of either order.
    ((300, 120, 4, 4), PHASES),
    ((120, 1, 16), WeightVectors((1, 3), view=(120, 1, 1, 2, 8))),
    ((20, 7, 4, 2, 6), WeightVectors((0, 2, 5), view=(20, 7, 2, 2, 2, 3, 2))),
    ((40, 2, 3, 6), WeightVectors((0, 2, 4), view=(40, 2, 3, 2, 3))),
    ((6, 700, 300), WeightVectors((1,))),
    ((2, 1200, 1001), WeightVectors((1,))),
]


@pytest.mark.parametrize("dtype", SERVED)
def test_every_path_through_the_kernels_equals_the_reference(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).add_(0.1).to(dtype) for shape, _ in LARGE]
    expected = [center(tensor.double(), vectors) for tensor, (_, vectors) in zip(tensors, LARGE, strict=True)]
    Centering().center_all_([(tensor, vectors) for tensor, (_, vectors) in zip(tensors, LARGE, strict=True)])
    for tensor, reference in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_large_steps_equal_float64(kind: str, placement: str, dtype: torch.dtype) -> None:
    """One step on every layout is compared with the formula in float64, rounded once."""
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape, _ in LARGE]
    gradients = [torch.randn(p.shape).add_(0.3).to(dtype) for p in params]
    before = [p.detach().to(torch.float64, copy=True) for p in params]
    model = torch.nn.ParameterList(params)
    layout = gradcentral.weight_layout(model, overrides={str(i): vectors for i, (_, vectors) in enumerate(LARGE)})
    optimizer = getattr(gradcentral, kind)([*model], layout=layout, placement=placement, **options)
    for p, g in zip(model, gradients, strict=True):
        p.grad = g
    optimizer.step()
    for p, w, g, (_, vectors) in zip(model, before, gradients, LARGE, strict=True):
        g_hat = g.double()
        if placement == "gradient":
            g_hat = center(g_hat, vectors)
        adams = -0.01 * w - 0.1 * g_hat / (g_hat.abs() + 1e-8)
        change = -0.1 * (g_hat + 0.1 * w) if kind == "SGD" else adams
        if placement == "update":
            change = center(change, vectors)
        # Adam's first step is the sign of the gradient, up to the rounding of its state.
        slack = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        error = (p.detach().double() - (w + change)).abs()
        near_zero = g_hat.abs() < 1e-3 if kind == "AdamW" else torch.zeros_like(g_hat, dtype=torch.bool)
        assert float((error / (w.abs() + 1)).masked_fill(near_zero, 0).max()) < slack


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_results_do_not_depend_on_the_number_of_threads(placement: str, dtype: torch.dtype, threads: Any) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape, _ in LARGE]
        model = torch.nn.ParameterList(params)
        layout = gradcentral.weight_layout(model, overrides={str(i): vectors for i, (_, vectors) in enumerate(LARGE)})
        optimizer = gradcentral.AdamW([*model], lr=0.1, layout=layout, placement=placement)
        for _ in range(2):
            for p in model:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in model])
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_steps_of_channels_last_phases_equal_those_of_contiguous_ones(placement: str) -> None:
    conv = torch.nn.ConvTranspose2d(30, 9, 4, stride=2)
    other = copy.deepcopy(conv).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nets = (conv, other)
    optimizers = [gradcentral.AdamW(net, lr=0.1, placement=placement) for net in nets]
    for _ in range(3):
        gradient = torch.randn(conv.weight.shape)
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.weight.grad = torch.empty_like(net.weight).copy_(gradient)
            assert loop_of(native, net.weight, gradcentral.weight_layout(net)["weight"]) is not None
            optimizer.step()
    torch.testing.assert_close(other.weight, conv.weight)


def test_units_with_too_many_taps_take_the_reference_path() -> None:
    weight, filters = torch.randn(6, 4, 4, 4), WeightVectors((0, 2, 3))
    for most, refused in ((15, True), (16, False)):
        kernels: Any = types.SimpleNamespace(serves=lambda tensor: True, DTYPES=native.DTYPES, MOST_TAPS=most)
        assert (loop_of(kernels, weight, filters) is None) is refused


@pytest.mark.parametrize("fan_in", [2, 9, 27, 1000, 4608, 100_000, 10_000_000])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_means_are_at_least_as_accurate_as_those_of_torch(fan_in: int, by: str) -> None:
    """Errors against float64 are measured in units of the rounding of the mean absolute element."""
    units = max(1, 200_000 // fan_in)
    x = torch.randn(units, fan_in, generator=torch.Generator().manual_seed(1)).add_(0.5)
    exact = x.double().mean(1)
    unit = 2.0**-24 * float(x.abs().double().mean())
    if by == "columns":
        x = x.T.contiguous()
    span = (1,) if by == "rows" else (0,)
    (means,) = Centering().means([(x, WeightVectors(span))]).planned
    ours = float((means - exact).abs().max()) / unit
    torchs = float((x.mean(span).double() - exact).abs().max()) / unit
    # Rounding a mean to f32 costs up to half a unit, so torch cannot be better than that.
    assert ours <= max(torchs, 1.0)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("placement", ["gradient", "update", "regularized"])
def test_a_constant_gradient_is_centered_to_zero(placement: str, dtype: torch.dtype) -> None:
    """Rows in blocks, rows alone and columns: a sum of ones, divided by the fan-in, is exactly one."""
    for fan_in in (2, 49, 98, 103, 196, 300, 5000):
        for vectors in (ROWS, COLUMNS):
            shape = (5, fan_in) if vectors is ROWS else (fan_in, 5)
            model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape, dtype=dtype))])
            layout = gradcentral.weight_layout(model, overrides={"0": vectors})
            model[0].grad = torch.ones_like(model[0])
            gradcentral.SGD([*model], lr=1.0, layout=layout, placement=placement).step()
            assert not model[0].any(), (fan_in, vectors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", SERVED)
def test_nan_and_inf_stay_in_their_weight_vector(bad: float, dtype: torch.dtype) -> None:
    for shape, vectors in (((5, 700), ROWS), ((700, 5), COLUMNS), ((300, 1100), COLUMNS)):
        tensor = torch.randn(shape).to(dtype)
        clean = center(tensor, vectors)
        axis = vectors.span[0]
        tensor.select(1 - axis, 3)[1] = bad
        Centering().center_all_([(tensor, vectors)])
        assert not tensor.select(1 - axis, 3).isfinite().any()
        others = [i for i in range(tensor.shape[1 - axis]) if i != 3]
        index = torch.tensor(others)
        kept, expected = tensor.index_select(1 - axis, index), clean.index_select(1 - axis, index)
        torch.testing.assert_close(kept, expected, rtol=0, atol=float(8 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("factor", [2.0**-9, -(2.0**-9), 3 * 2.0**-9, 2.0**-10, 1.0, 0.0, 2.0**9])
def test_bf16_rounds_like_torch(factor: float) -> None:
    """Every bf16 number plus a fraction of it: halves, other fractions, denormals, overflow, Inf and NaN."""
    w = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    g = (w.float() * factor).bfloat16()
    expected = (w.float() - g.float()).bfloat16()
    work = native.WorkList([(Loop(w.numel(), 1, 1, 1), 0)], native.DTYPES[torch.bfloat16])
    pointers = array("Q", [w.data_ptr(), g.data_ptr(), 0, 0, 0, 0])
    work.run(pointers, UpdateRule.SGD, Coefficients(lr=1.0))
    torch.testing.assert_close(w, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("fan_in", [27, 32, 5001])  # in a block of rows, alone, and larger than a block
def test_an_infinite_weight_leaves_the_other_rows_and_elements_alone(fan_in: int, dtype: torch.dtype) -> None:
    """Placement "update" does not center a change whose mean does not exist: that row takes torch's step."""
    start, gradient = torch.randn(6, fan_in).to(dtype), torch.randn(6, fan_in).to(dtype)
    results = []
    for infinite, placement in ((True, "update"), (False, "update"), (True, None)):
        w = torch.nn.Parameter(start.clone())
        if infinite:
            w.data[2, 1] = -math.inf
        w.grad = gradient.clone()
        if placement is None:
            torch.optim.AdamW([w], lr=0.1, weight_decay=0.0).step()
        else:
            layout = WeightLayout.from_shapes([w])
            gradcentral.AdamW([w], lr=0.1, weight_decay=0.0, layout=layout, placement=placement).step()
        results.append(w.detach())
    found, finite, plain = results
    rest = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(found[rest], finite[rest])
    torch.testing.assert_close(found[2], plain[2], rtol=0, atol=float(4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", SERVED)
def test_nan_stays_in_its_phase(dtype: torch.dtype) -> None:
    tensor = torch.randn(40, 3, 4, 4).to(dtype)
    vectors = WeightVectors.parse("[i] o ([m] 2) ([m] 2)", tensor.shape)
    expected = center(tensor, vectors)
    tensor[5, 1, 3, 2] = math.nan
    Centering().center_all_([(tensor, vectors)])
    phase = torch.zeros(tensor.shape, dtype=torch.bool)
    phase[:, 1, 1::2, ::2] = True
    assert tensor[phase].isnan().all()
    torch.testing.assert_close(tensor[~phase], expected[~phase], rtol=0, atol=float(8 * torch.finfo(dtype).eps))


@given(
    loops=st.lists(
        st.tuples(st.builds(Loop, *[st.integers(1, size) for size in (9, 3000, 3000, 30)]), st.sampled_from([0, 1, 2])),
        max_size=5,
    ),
    dtype=st.sampled_from([0, 1, 2]),
)
@example(loops=[(Loop(2**33, 9, 1, 1), 1), (Loop(1, 2**17, 2**17, 1), 1), (Loop(2**35, 1, 1, 1), 0)], dtype=0)
@example(loops=[(Loop(1, 2, 2**34, 1), 2), (Loop(1, 3, 7, 2**33), 1)], dtype=1)
@example(loops=[(Loop(0, 3, 1, 1), 1), (Loop(5, 3, 1, 1), 1)], dtype=2)
def test_pieces_cover_every_element_once_in_order(loops: list[tuple[Loop, int]], dtype: int) -> None:
    """Sizes beyond 2³¹ elements are tested without allocating them."""
    work = native.WorkList(loops, dtype, with_scratch=False)
    covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
    wave_of: dict[tuple[int, int], list[int]] = {}
    batches, waves = list(work.batches), list(work.waves)
    assert batches == sorted(set(batches))
    assert waves == sorted(waves)
    for wave in range(len(waves) - 1):
        for batch in range(waves[wave], waves[wave + 1]):
            for position in range(batches[batch], batches[batch + 1]):
                piece = work.pieces[position]
                covered.setdefault((piece.parameter, piece.kind), []).append((piece.begin, piece.end))
                wave_of.setdefault((piece.parameter, piece.kind), []).append(wave)
    elements, rows, groups, sums, steps = range(5)
    for index, ((loop, placement), item) in enumerate(zip(loops, work.parameters, strict=True)):
        width, total = loop.units * loop.inner, math.prod(loop)
        if total == 0:
            expected = {}
        elif placement == 0:
            expected = {elements: total}
        elif width == 1:
            expected = {rows: loop.groups}
        elif item.blocks == 1:
            expected = {groups: loop.groups}
        else:
            expected = {sums: loop.groups * item.blocks, steps: loop.groups * loop.outer}
            assert max(wave_of[index, sums]) < min(wave_of[index, steps])
        assert {kind for position, kind in covered if position == index} == set(expected)
        for kind, count in expected.items():
            ranges = covered[index, kind]
            assert ranges[0][0] == 0
            assert ranges[-1][1] == count
            assert all(one[1] == other[0] for one, other in pairwise(ranges))


def test_memory_of_a_plan_is_at_most_one_number_per_weight_vector_of_gpt2() -> None:
    from gradcentral.bench.shapes import MODELS

    shapes = [(shape, vectors) for shape, vectors in MODELS["GPT-2"]() if vectors is not None]
    loops = [(loop, 1) for _, vectors in shapes if (loop := loop_of_vectors(vectors)) is not None]
    numbers = native.WorkList(loops, 0, with_scratch=False).scratch_bytes / 8
    assert numbers <= sum(vectors.count for _, vectors in shapes)


# Fallback to the reference path.


def test_only_plain_dense_tensors_are_served() -> None:
    whole = torch.randn(4, 6)
    assert loop_of(native, whole, ROWS) == Loop(4, 6, 1, 1)
    assert loop_of(native, whole, None) == Loop(24, 1, 1, 1)
    assert loop_of(native, torch.tensor(1.0), None) == Loop(1, 1, 1, 1)
    refused = (
        whole[:, 1:],
        whole.half(),
        whole.to(torch.complex64),
        torch.ones(1, 6).expand(4, 6),
        whole.to_sparse(),
        whole.to("meta"),
        whole.to(torch.complex64).conj().imag,
    )
    for tensor in refused:
        assert loop_of(native, tensor, ROWS) is None


def test_state_with_other_strides_falls_back_to_torch() -> None:
    """A checkpoint of a contiguous model is loaded into a channels_last model."""
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = gradcentral.SGD(conv, lr=0.1, momentum=0.9)
    reference = torch.nn.Conv2d(3, 4, 3)
    reference.load_state_dict(conv.state_dict())
    torchs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    gradcentral.centralize(torchs, reference)
    buffers = [torch.randn(4, 3, 3, 3), torch.randn(4)]
    for opt in (optimizer, torchs):
        for p, buffer in zip(opt.param_groups[0]["params"], buffers, strict=True):
            opt.state[p]["momentum_buffer"] = buffer.clone()
    g = [torch.randn(4, 3, 3, 3), torch.randn(4)]
    for net, opt in ((conv, optimizer), (reference, torchs)):
        for p, gradient in zip(net.parameters(), g, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)
        opt.step()
    for p, q in zip(conv.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_available_gives_a_reason_for_each_kernel() -> None:
    found = unavailable_reasons()
    assert [*found] == ["reference", "native", "triton"]
    assert (found["reference"], found["native"]) == ("", "")


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("reference", "GRADCENTRAL_KERNELS=reference"),
        ("native", ""),
        ("triton!", "choose from reference, native, triton"),
    ],
)
def test_the_environment_variable_selects_the_kernels(value: str, outcome: str) -> None:
    code = "from gradcentral import kernels; print(kernels.unavailable_reasons()['native'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GRADCENTRAL_KERNELS": value}, capture_output=True, text=True
    )
    assert outcome in run.stdout + run.stderr
    assert (run.returncode == 0) == (value != "triton!")


def test_a_layout_from_shapes_equals_the_reference() -> None:
    """WeightLayout.from_shapes and the kernels agree on the rows of a convolution."""
    p = torch.nn.Parameter(torch.randn(8, 3, 5, 5))
    p.grad = torch.randn_like(p)
    expected = center(p.grad, WeightVectors((1, 2, 3)))
    gradcentral.centralize_gradients(layout=WeightLayout.from_shapes([p]))
    torch.testing.assert_close(p.grad, expected)


# Remedies.


def test_remedy_for_a_missing_or_broken_library(tmp_path: Path) -> None:
    """Both messages suggest reinstalling gradcentral with a C compiler; setup.py then builds the library."""
    library, reason = native._load(tmp_path)
    assert (library, "install a working C compiler and reinstall gradcentral" in reason) == (None, True)
    (tmp_path / "_native.so").write_bytes(b"not a library")
    library, reason = native._load(tmp_path)
    assert (library, "reinstall gradcentral" in reason) == (None, True)
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    root = Path(__file__).parents[2]
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=root, check=True, capture_output=True)
    library, reason = native._load(tmp_path / "gradcentral" / "kernels")
    assert (library is not None, reason) == (True, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not native.has_openmp(), reason="needs the C kernels with OpenMP")
def test_one_openmp_runtime_in_the_process() -> None:
    """A second one would start threads that compete with torch's."""
    code = (
        "import torch; before = open('/proc/self/maps').read()\n"
        "from gradcentral.kernels import native; assert native.has_openmp()\n"
        "after = open('/proc/self/maps').read()\n"
        "runtimes = [{line.split()[-1] for line in maps.splitlines() if 'omp' in line.split('/')[-1]}"
        " for maps in (before, after)]\n"
        "assert len(runtimes[0]) == 1, runtimes\nassert runtimes[0] == runtimes[1], runtimes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_reason_names_a_missing_openmp_runtime(tmp_path: Path) -> None:
    source = tmp_path / "library.c"
    source.write_text("void GOMP_absent(void);\nvoid run(void) { GOMP_absent(); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "_native.so"], check=True)
    assert native._load(tmp_path) == (
        None,
        "_native.so needs an OpenMP runtime, and this build of torch has loaded none",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
@pytest.mark.parametrize(
    ("real", "system"),
    [
        pytest.param("cc", "any", id="without OpenMP, as Apple's"),
        pytest.param("clang", "linux", id="with another OpenMP runtime than torch's"),
    ],
)
def test_a_compiler_without_the_openmp_of_torch_builds_kernels_for_one_thread(
    tmp_path: Path, real: str, system: str
) -> None:
    if shutil.which(real) is None or system not in ("any", sys.platform):
        pytest.skip(f"needs {real}")
    compiler = tmp_path / "my-cc"
    reject = 'case " $* " in *" -fopenmp "*) exit 1 ;; esac\n' if real == "cc" else ""
    compiler.write_text(f'#!/bin/sh\n{reject}exec {real} "$@"\n')
    compiler.chmod(0o755)
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {**os.environ, "CC": str(compiler)}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, *build], cwd=root, env=environment, check=True, capture_output=True)
    library, reason = native._load(tmp_path / "gradcentral" / "kernels")
    assert (library.gradcentral_has_openmp(), reason) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
@pytest.mark.parametrize("found", [True, False])
def test_the_reason_tells_a_missing_compiler_from_a_failing_one(tmp_path: Path, found: bool) -> None:
    compiler = tmp_path / "my-cc"
    if found:
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {**os.environ, "CC": str(compiler)}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, *build], cwd=root, env=environment, check=True, capture_output=True)
    expected = f"the C compiler {compiler} failed" if found else f"no C compiler was found ({compiler})"
    library, reason = native._load(tmp_path / "gradcentral" / "kernels")
    assert library is None
    assert reason.startswith(f"not built, because {expected}")


def test_remedy_for_shapes_that_change_during_a_step() -> None:
    """The message suggests changing shapes between steps."""
    weight = torch.randn(4, 6)
    centering = Centering()
    means = centering.means([(weight, ROWS)])
    larger = torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="change shapes between steps"):
        centering.restore_([(larger, ROWS)], means)
    means = centering.means([(larger, ROWS)])
    centering.restore_([(larger.add_(1), ROWS)], means)
