"""The Triton kernels compared with the reference path and float64, on a CUDA device or in Triton's interpreter.

Shapes are small, because the interpreter is slow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradcentral
from gradcentral import WeightVectors, center, weight_layout
from gradcentral.kernels import Centering, native, triton
from gradcentral.kernels.forms import Placement
from gradcentral.kernels.loops import Loop
from gradcentral.kernels.planner import loop_of
from gradcentral.kernels.triton import division
from gradcentral.kernels.triton.division import TileShape
from gradcentral.targets import PLACEMENTS
from tests.strategies import Case, cases, shapes_and_vectors

why_not = triton.unavailable_reason()
pytestmark = pytest.mark.skipif(
    bool(why_not),
    reason=f"needs a CUDA device, or TRITON_INTERPRET=1 and GRADCENTRAL_KERNELS=triton in the environment ({why_not})",
)
DEVICE = "cpu" if triton.serves_cpu else "cuda"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no streams or graphs")

SERVED = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = WeightVectors((1,)), WeightVectors((0,))
TAPS = WeightVectors((0, 2, 3))

# Every path through the kernel: unaligned and aligned widths, incomplete blocks.
LAYOUTS: dict[str, tuple[tuple[int, ...], WeightVectors]] = {
    "long": ((3, 301), ROWS),
    "long aligned": ((2, 1040), ROWS),
    "middle aligned": ((17, 80), ROWS),
    "short": ((70, 9), ROWS),
    "across": ((70, 33), COLUMNS),
    "across aligned": ((40, 48), COLUMNS),
    "few across": ((9, 5), COLUMNS),
    "taps": ((30, 3, 3, 3), TAPS),
    "taps aligned": ((40, 5, 4, 4), TAPS),
    "phases": ((20, 3, 4, 4), WeightVectors.parse("[i] o ([2] 2) ([2] 2)", (20, 3, 4, 4))),
    "grouped phases": ((6, 7, 6), WeightVectors.parse("(2 [3]) o ([2] 3)", (6, 7, 6))),
    "groups of taps": ((12, 4, 3, 3), WeightVectors((1, 3, 4), view=(3, 4, 4, 3, 3))),
    "groups of columns": ((2, 40, 16), WeightVectors((1,))),
}
ALONE = [(5,), (32,), (1,)]
NAMES = ["middle aligned", "across"]


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter() -> Iterator[None]:
    """Patch Triton's language once: its interpreter would do so at each call of a function."""
    if DEVICE == "cuda" or why_not:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    original, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    scope = original(everything)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    yield
    scope.restore()
    interpreter._patch_lang, interpreter.interpreter_builder.options = original, options


@contextmanager
def reference_path() -> Iterator[None]:
    """Turn off all kernels."""
    before = native._unavailable, triton._unavailable
    native._unavailable = triton._unavailable = "turned off by a test"
    try:
        yield
    finally:
        native._unavailable, triton._unavailable = before


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split weight vectors into parts, in small sets, although they would fit one program."""
    monkeypatch.setattr(division, "LONGEST", 1 << 11)
    monkeypatch.setattr(division, "SET", 1 << 9)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def pairs_of(dtype: torch.dtype) -> list[tuple[Tensor, WeightVectors]]:
    return [((randn(*shape) + 0.3).to(dtype), vectors) for shape, vectors in LAYOUTS.values()]


def served(pairs: list[tuple[Tensor, WeightVectors]]) -> list[Any]:
    """Return the parameters as the kernel reads them."""
    loops = [loop_of(triton, *pair) for pair in pairs]
    assert None not in loops
    centered = [(loop, Placement.GRADIENT) for loop in loops if loop is not None]
    table = division.divide(centered, pairs[0][0].itemsize).parameters
    return [division.TiledParameter(*row) for row in table.tolist()]


# Centering.


def test_the_layouts_cover_every_tile_shape() -> None:
    shapes = {item.shape for item in served(pairs_of(torch.float32))}
    assert shapes == {*TileShape} - {TileShape.PLAIN, TileShape.PLAIN_ALIGNED}


@pytest.mark.parametrize("dtype", SERVED)
def test_centering_equals_float64(dtype: torch.dtype) -> None:
    pairs = pairs_of(dtype)
    expected = [center(tensor.double(), vectors) for tensor, vectors in pairs]
    Centering().center_all_(pairs)
    for (tensor, _), reference in zip(pairs, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centering_in_parts_equals_float64(dtype: torch.dtype, in_parts: None) -> None:
    pairs = pairs_of(dtype)
    assert sum(item.parts > 1 for item in served(pairs)) >= 3
    expected = [center(tensor.double(), vectors) for tensor, vectors in pairs]
    centering = Centering()
    for _ in range(2):  # the second relies on the counters that the first has reset
        centering.center_all_(pairs)
    for (tensor, _), reference in zip(pairs, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_means_shifts_each_weight_vector(
    dtype: torch.dtype, cut: bool, request: pytest.FixtureRequest
) -> None:
    if cut:
        request.getfixturevalue("in_parts")
    pairs = pairs_of(dtype)
    means = [tensor.double() - center(tensor.double(), vectors) for tensor, vectors in pairs]
    centering = Centering()
    kept = centering.means(pairs)
    assert [found.numel() for found in kept.planned] == [sum(v.for_shape(t.shape).count for t, v in pairs)]
    for tensor, _ in pairs:
        tensor.add_(0.25)
    expected = [center(tensor.double(), vectors) for tensor, vectors in pairs]
    centering.restore_(pairs, kept)
    for (tensor, _), centered, mean in zip(pairs, expected, means, strict=True):
        torch.testing.assert_close(tensor.double(), centered + mean, rtol=0, atol=4 * torch.finfo(dtype).eps)


@settings(max_examples=15)
@given(drawn=st.lists(cases((*SERVED, torch.float64, torch.complex64), expanded=False), min_size=1, max_size=3))
def test_centering_equals_the_reference_on_random_layouts(drawn: list[Case]) -> None:
    """Strides and dtypes are mixed; the reference path centers tensors that the kernels do not support."""
    pairs = [(case.tensor.to(DEVICE), case.vectors) for case in drawn]
    expected = [center(*pair) for pair in pairs]
    Centering().center_all_(pairs)
    for (tensor, _), reference in zip(pairs, expected, strict=True):
        rounding = torch.finfo(tensor.dtype).eps * float(tensor.abs().max() + 1)
        torch.testing.assert_close(tensor, reference, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["middle aligned", "short", "across", "long"])
def test_nan_and_inf_stay_in_their_weight_vector(name: str, bad: float) -> None:
    shape, vectors = LAYOUTS[name]
    tensor = randn(*shape)
    clean = center(tensor, vectors)
    unit = 1 - vectors.span[0]
    tensor.select(unit, 2)[1] = bad
    Centering().center_all_([(tensor, vectors)])
    assert not tensor.select(unit, 2).isfinite().any()
    others = torch.tensor([i for i in range(shape[unit]) if i != 2], device=DEVICE)
    torch.testing.assert_close(tensor.index_select(unit, others), clean.index_select(unit, others), rtol=0, atol=1e-6)


# Steps.

# With torch's 1e-8, an element whose centered gradient happens to be near 0 is moved by its rounding error.
EPS = 1e-3
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd l2 maximize": ("SGD", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "momentum dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "adam l2": ("Adam", {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": EPS}),
    "adam without momentum": ("Adam", {"lr": 0.01, "betas": (0.0, 0.9), "eps": EPS}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True, "eps": EPS}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "eps": EPS}),
    "adamw amsgrad": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "eps": EPS}),
}
# A few rounding errors: one rounding changes a weight by up to 2⁻²⁴, 2⁻⁸ or 2⁻¹¹ of it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def model_of(dtype: torch.dtype, names: Any = LAYOUTS) -> nn.ParameterList:
    """Return a model with these layouts and some parameters that are not centered."""
    weights = [randn(*LAYOUTS[name][0], dtype=dtype) for name in names] + [
        randn(*shape, dtype=dtype) for shape in ALONE
    ]
    return nn.ParameterList(nn.Parameter(weight) for weight in weights)


def make(name: str, model: nn.ParameterList, names: Any = LAYOUTS, **gc: Any) -> Any:
    kind, options = ALGORITHMS[name]
    overrides: dict[Any, Any] = {str(i): LAYOUTS[layout][1] for i, layout in enumerate(names)}
    layout = weight_layout(model, overrides=overrides)
    return getattr(gradcentral, kind)([*model], layout=layout, **{**options, **gc})


def gradients_of(model: nn.ParameterList) -> list[Tensor]:
    return [(randn(*p.shape) + 0.5).to(p.dtype) for p in model]


def take(optimizer: Any, model: nn.ParameterList, gradients: list[Tensor]) -> None:
    for p, g in zip(model, gradients, strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


def assert_equal_steps(
    name: str, placement: str, dtype: torch.dtype, names: Any = LAYOUTS, steps: int = 2, **options: Any
) -> None:
    """Compare some steps with the reference path in float64, from the same weights with the same gradients."""
    model = model_of(dtype, names)
    truth = copy.deepcopy(model).double()
    ours, exact = (
        make(name, model, names, placement=placement, **options),
        make(name, truth, names, placement=placement),
    )
    for _ in range(steps):
        gradients = gradients_of(model)
        take(ours, model, gradients)
        with reference_path():
            take(exact, truth, gradients)
    for p, q in zip(model, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_equal_the_reference(name: str, placement: str) -> None:
    assert_equal_steps(name, placement, torch.float32)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw amsgrad"])
def test_narrow_steps_equal_the_reference(name: str, placement: str) -> None:
    assert_equal_steps(name, placement, torch.bfloat16)


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_f16_steps_equal_the_reference(name: str) -> None:
    """Momentum in f16 falls back to torch, as do all f16 states: squares of small gradients would underflow."""
    assert_equal_steps(name, "gradient", torch.float16, ["middle aligned", "short", "across aligned", "taps"])


@pytest.mark.parametrize(
    ("name", "placement", "dtype"),
    [
        ("nesterov", "gradient", torch.float32),
        ("nesterov", "update", torch.bfloat16),
        ("nesterov", "regularized", torch.float32),
        ("adamw", "gradient", torch.bfloat16),
        ("adamw", "update", torch.float32),
    ],
)
def test_steps_in_parts_equal_the_reference(name: str, placement: str, dtype: torch.dtype, in_parts: None) -> None:
    assert_equal_steps(name, placement, dtype, ["long aligned", "across", "taps"])


@settings(max_examples=12)
@given(
    drawn=st.lists(shapes_and_vectors(), min_size=1, max_size=2),
    name=st.sampled_from([*ALGORITHMS]),
    placement=st.sampled_from(PLACEMENTS),
    data=st.data(),
)
def test_steps_equal_the_reference_on_random_layouts(
    drawn: list[tuple[tuple[int, ...], WeightVectors]], name: str, placement: str, data: st.DataObject
) -> None:
    """The axes are in any memory order."""
    weights = []
    for shape, _ in drawn:
        order = data.draw(st.permutations(range(len(shape))))
        w = randn(*(shape[axis] for axis in order))
        weights.append(w.permute(*(order.index(axis) for axis in range(len(shape)))))
    results = []
    gradients = [torch.empty_like(w).copy_(randn(*w.shape) + 0.5) for w in weights]
    for dtype in (torch.float32, torch.float64):
        model = nn.ParameterList(nn.Parameter(w.to(dtype, copy=True)) for w in weights)
        model.append(nn.Parameter(torch.zeros(2, 2, dtype=dtype, device=DEVICE)))  # at least one parameter is centered
        rules: dict[Any, Any] = {str(i): v for i, (s, v) in enumerate(drawn) if v.for_shape(s).fan_in > 1}
        layout = weight_layout(model, overrides={**rules, str(len(weights)): ROWS})
        kind, options = ALGORITHMS[name]
        optimizer = getattr(gradcentral, kind)([*model], layout=layout, placement=placement, **options)
        for _ in range(2):
            for p, g in zip(model, gradients, strict=False):
                p.grad = torch.empty_like(p).copy_(g)
            optimizer.step()
        results.append([p.detach().double() for p in model])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_narrow_weights_with_wide_state(name: str, placement: str, dtype: torch.dtype) -> None:
    names = ["middle aligned", "short", "across aligned", "taps"]
    model = model_of(dtype, names)
    truth = copy.deepcopy(model).double()
    ours, exact = make(name, model, names, placement=placement), make(name, truth, names, placement=placement)
    for p in model:
        states = ["momentum_buffer"] if name == "nesterov" else ["exp_avg", "exp_avg_sq"]
        ours.state[p] = {state: torch.zeros(p.shape, device=DEVICE) for state in states}
        if name == "adamw":
            ours.state[p]["step"] = torch.zeros((), device=DEVICE)
    for _ in range(2):
        gradients = gradients_of(model)
        take(ours, model, gradients)
        with reference_path():
            take(exact, truth, gradients)
    for p, q in zip(model, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for state, found in ours.state[p].items():
            assert found.dtype == torch.float32
            expected = exact.state[q][state].to(DEVICE, torch.float64)  # torch keeps its step counters on the host
            torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_update_keeps_the_mean_of_narrow_weights() -> None:
    """Each weight is rounded once, so the mean of many is off by less than one rounding of a weight."""
    model = model_of(torch.bfloat16, ["long aligned"])
    optimizer = make("nesterov", model, ["long aligned"], placement="update", lr=1e-2)
    before = model[0].detach().double().mean(1)
    take(optimizer, model, gradients_of(model))
    after = model[0].detach().double().mean(1)
    assert float((after - before).abs().max()) < 2**-8 / math.sqrt(1040) * 3


@pytest.mark.parametrize("name", ["momentum dampened", "adamw"])
def test_one_launch_performs_the_whole_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradcentral.kernels.triton.plans import TritonPlan

    launches: list[Any] = []
    start = TritonPlan._start

    def counting(self: TritonPlan, *arguments: Any) -> None:
        launches.append(arguments)
        start(self, *arguments)

    monkeypatch.setattr(TritonPlan, "_start", counting)
    model = model_of(torch.float32)
    optimizer = make(name, model)
    for _ in range(2):
        take(optimizer, model, gradients_of(model))
    assert len(launches) == 2


def test_a_plan_follows_replaced_tensors() -> None:
    """Gradients change at each step; weights and states are replaced; one pointer is unaligned."""
    names = ["middle aligned", "across aligned"]
    model, truth = model_of(torch.float32, names), nn.ParameterList()
    truth = copy.deepcopy(model).double()
    ours, exact = make("nesterov", model, names), make("nesterov", truth, names)
    for turn in range(4):
        gradients = gradients_of(model)
        if turn == 1:
            gradients = [torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape) for g in gradients]
            assert any(g.data_ptr() % 16 for g in gradients)
        if turn == 2:
            for net in (model, truth):
                net[0].data = net[0].data.clone() * 2
        if turn == 3:
            for optimizer in (ours, exact):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        take(ours, model, gradients)
        with reference_path():
            take(exact, truth, gradients)
    for p, q in zip(model, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_whose_strides_change_in_place_is_stepped_as_by_torch(key: str) -> None:
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        model = nn.Linear(16, 16, bias=False, device=DEVICE)
        optimizer = gradcentral.AdamW(model, lr=0.1, fused=fused)
        for step in range(4):
            model.weight.grad = randn(16, 16)
            optimizer.step()
            if step == 1:
                optimizer.state[model.weight][key].t_()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_captured_step_has_its_own_pointer_table() -> None:
    """Later steps with other gradients do not change the pointers that a CUDA graph reads at each replay."""
    from gradcentral.kernels.triton import plans

    table = plans._PointerTable(torch.device(DEVICE), 3)
    eager, _ = table.uploaded([16, 32, 48], capturing=False)
    captured, aligned = table.uploaded([64, 80, 97], capturing=True)
    assert not aligned
    with pytest.raises(RuntimeError, match="capture one step per graph"):
        table.uploaded([1, 2, 3], capturing=True)
    assert table.uploaded([16, 32, 48], capturing=False) == (eager, True)
    table.uploaded([112, 128, 144], capturing=False)
    assert captured.tolist() == [64, 80, 97]
    assert eager.tolist() == [112, 128, 144]
    # The remedy: one step outside of a capture before the next capture.
    assert table.uploaded([1, 2, 3], capturing=True)[0].tolist() == [1, 2, 3]


def test_a_plan_made_before_the_capture_is_used_during_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message suggests calling optimizer.step() once before the capture."""
    from gradcentral.kernels.triton import plans

    model = model_of(torch.float32, NAMES)
    optimizer = make("adamw", model, NAMES)
    gradients = gradients_of(model)
    with monkeypatch.context() as capture:
        capture.setattr(plans, "_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"call optimizer.step\(\) once with such tensors before the capture"):
            take(optimizer, model, gradients)
    optimizer.step()
    with monkeypatch.context() as capture:
        capture.setattr(plans, "_capturing", lambda device: True)
        optimizer.step()
    assert float(optimizer.state[model[0]]["step"]) == 2


def snapshot(optimizer: Any, model: nn.ParameterList) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*model, *states)]


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("name", ["sgd", "momentum dampened", "adamw amsgrad"])
def test_a_step_with_infinite_gradients_changes_nothing(name: str, placement: str, in_parts: None) -> None:
    """A GradScaler's found_inf is read on the device; after a skipped first step, the next step counts as the first."""
    model = model_of(torch.float32, NAMES)
    twin = copy.deepcopy(model)
    optimizer, plain = make(name, model, NAMES, placement=placement), make(name, twin, NAMES, placement=placement)
    for turn in range(2):
        optimizer.grad_scale = torch.tensor(1024.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
        if turn == 1:
            before = snapshot(optimizer, model)
        take(optimizer, model, [g * math.nan for g in gradients_of(model)])
        if turn == 1:
            assert all(torch.equal(now, then) for now, then in zip(snapshot(optimizer, model), before, strict=True))
        optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
        gradients = gradients_of(model)
        take(optimizer, model, [1024 * g for g in gradients])
        take(plain, twin, gradients)
    for p, q in zip(model, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_learning_rate_on_the_device_is_read_by_the_kernel(kind: str) -> None:
    name = "nesterov" if kind == "SGD" else "adamw"
    assert_equal_steps(
        name, "gradient", torch.float32, NAMES, lr=torch.tensor(ALGORITHMS[name][1]["lr"], device=DEVICE)
    )


def test_capturable_steps_use_the_kernel() -> None:
    model = model_of(torch.float32, NAMES)
    optimizer = make("adamw", model, NAMES, capturable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradcentral.AdamW, "_rest_by_torch", lambda *_: pytest.fail("torch's own step ran"))
        take(optimizer, model, gradients_of(model))
    assert float(optimizer.state[model[0]]["step"]) == 1


def test_parameters_without_gradients_are_skipped() -> None:
    model = model_of(torch.float32, NAMES)
    optimizer = make("adamw", model, NAMES)
    take(optimizer, model, gradients_of(model))
    before = snapshot(optimizer, model)
    for p in model:
        p.grad = None
    model[1].grad = torch.ones_like(model[1])
    optimizer.step()
    changed = [not torch.equal(p.detach(), old) for p, old in zip(model, before, strict=False)]
    assert changed == [False, True, False, False, False]
    assert [float(optimizer.state[p]["step"]) for p in model] == [1, 2, 1, 1, 1]


def test_checkpoints_of_an_unfused_torch_optimizer_load() -> None:
    """The checkpoint's step counters are on the CPU; loading moves them to the device."""
    model = model_of(torch.float32, NAMES)
    truth = copy.deepcopy(model).double()
    torchs = torch.optim.AdamW([*model], lr=0.01, weight_decay=0.1)
    take(torchs, model, gradients_of(model))
    for p, q in zip(model, truth, strict=True):
        q.data.copy_(p.detach())
    ours, exact = make("adamw", model, NAMES), make("adamw", truth, NAMES)
    ours.load_state_dict(torchs.state_dict())
    exact.load_state_dict(copy.deepcopy(torchs.state_dict()))
    gradients = gradients_of(model)
    take(ours, model, gradients)
    with reference_path():
        take(exact, truth, gradients)
    for p, q in zip(model, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)
        assert ours.state[p]["step"].device.type == DEVICE
        assert float(ours.state[p]["step"]) == 2


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_attaching_to_a_torch_optimizer(placement: str) -> None:
    model = model_of(torch.float32, NAMES)
    truth = copy.deepcopy(model).double()
    optimizers = []
    for net in (model, truth):
        rules: dict[Any, Any] = {str(i): LAYOUTS[name][1] for i, name in enumerate(NAMES)}
        optimizer = torch.optim.SGD([*net], lr=0.1, momentum=0.9, weight_decay=0.01)
        gradcentral.centralize(optimizer, layout=weight_layout(net, overrides=rules), placement=placement)
        optimizers.append(optimizer)
    for _ in range(2):
        gradients = gradients_of(model)
        take(optimizers[0], model, [g.clone() for g in gradients])
        with reference_path():
            take(optimizers[1], truth, gradients)
    for p, q in zip(model, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)


def test_only_plain_dense_tensors_are_served() -> None:
    whole = randn(4, 6)
    assert loop_of(triton, whole, ROWS) == Loop(4, 6, 1, 1)
    assert loop_of(triton, whole, None) == Loop(24, 1, 1, 1)
    for refused in (
        whole[:, 1:],
        whole.double(),
        whole.to(torch.complex64),
        torch.ones(1, 6, device=DEVICE).expand(4, 6),
        whole.to_sparse(),
        whole.to("meta"),
        whole.to(torch.complex64).conj().imag,
    ):
        assert loop_of(triton, refused, ROWS) is None


def test_autograd_detects_in_place_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(DEVICE)
    optimizer = gradcentral.SGD(model, lr=0.1)
    loss = model(torch.randn(2, 4, device=DEVICE)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Tests that need a GPU.


@on_a_gpu
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_a_captured_step_equals_an_eager_one(name: str) -> None:
    model = model_of(torch.float32)
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer, eager = make(name, model, lr=lr), make(name, twin, lr=lr)
    static = [torch.zeros_like(p) for p in model]
    for p, g in zip(model, static, strict=True):
        p.grad = g
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()  # builds the plan outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    take(eager, twin, [torch.zeros_like(g) for g in static])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for turn in range(4):
        gradients = gradients_of(model)
        lr.fill_(0.01 * (turn + 1))
        for g, new in zip(static, gradients, strict=True):
            g.copy_(new)
        if turn == 2:  # an eager step with other gradients between replays does not affect the graph
            take(optimizer, model, gradients)
        else:
            graph.replay()
        take(eager, twin, gradients)
    for p, q in zip(model, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@on_a_gpu
def test_a_graph_replays_after_the_plan_was_replaced() -> None:
    model = model_of(torch.float32, NAMES)
    optimizer = make("nesterov", model, NAMES)
    take(optimizer, model, gradients_of(model))
    twin = copy.deepcopy(model)
    other = make("nesterov", twin, NAMES)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a loaded state is not copied
    static = gradients_of(model)
    for p, g in zip(model, static, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    model[0].grad = None  # needs another plan, without this parameter
    optimizer.step()
    twin[0].grad = None
    for q, g in zip(list(twin)[1:], static[1:], strict=True):
        q.grad = g
    other.step()
    torch.cuda.empty_cache()
    graph.replay()
    take(other, twin, static)
    for p, q in zip(model, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@on_a_gpu
def test_a_plan_is_not_made_while_a_graph_is_captured() -> None:
    model = model_of(torch.float32, NAMES)
    optimizer = make("adamw", model, NAMES)
    for p in model:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="no plan can be created"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@on_a_gpu
def test_steps_do_not_synchronize() -> None:
    model = model_of(torch.float32, NAMES)
    optimizer = make("adamw", model, NAMES, fused=True)
    take(optimizer, model, gradients_of(model))
    batches = [gradients_of(model) for _ in range(3)]
    optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradients in batches:
            take(optimizer, model, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_steps_run_on_the_current_stream() -> None:
    model = model_of(torch.float32, NAMES)
    twin = copy.deepcopy(model)
    optimizer, plain = make("nesterov", model, NAMES), make("nesterov", twin, NAMES)
    gradients = [gradients_of(model) for _ in range(3)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a step on another stream would finish before this operation
        for step in gradients:
            take(optimizer, model, step)
        found = [p.detach().clone() for p in model]
    torch.cuda.current_stream().wait_stream(stream)
    for step in gradients:
        take(plain, twin, step)
    assert all(torch.equal(p, q) for p, q in zip(found, twin, strict=True))


@on_a_gpu
def test_large_rows_and_columns_equal_float64() -> None:
    """With these sizes, weight vectors are split into parts on a real device."""
    pairs = [(randn(3, 700_001), ROWS), (randn(1000, 50_000), ROWS), (randn(9000, 1100), COLUMNS)]
    expected = [center(tensor.double(), vectors) for tensor, vectors in pairs]
    centering = Centering()
    for _ in range(3):
        centering.center_all_(pairs)
    for (tensor, _), reference in zip(pairs, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=0, atol=2e-6)
