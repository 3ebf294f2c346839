"""Steps under ``torch.compile`` equal eager ones, with few graphs and one node that centers.

tests/optim/test_compiled.py tests the operator of gradcentral's own optimizers.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import gradcentral
from gradcentral import WeightVectors, center, centralize_gradients, weight_layout
from gradcentral.kernels import compiled
from gradcentral.kernels.forms import UpdateRule
from gradcentral.projection import unit_means
from gradcentral.targets import PLACEMENTS

# torch's compiler imports deprecated parts of torch.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def with_inductor(*cases: tuple[str, ...]) -> list[Any]:
    """Return the cases with the backend appended, to be skipped without a C++ compiler."""
    needs = pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler: install g++, or set CXX")
    return [pytest.param(*case, "inductor", marks=needs) for case in cases]


class Net(nn.Module):
    """Rows, the phases of grouped transposed filters (a view of the weight), and parameters that are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=3, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.up(self.conv(x).relu())).flatten(1))
        return out


def _attached(kind: type[Optimizer], **options: Any) -> Callable[..., Optimizer]:
    def make(model: nn.Module, placement: str) -> Optimizer:
        optimizer = kind(model.parameters(), **options)
        gradcentral.centralize(optimizer, model, placement)
        return optimizer

    return make


MOMENTUM: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
OURS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda model, placement: gradcentral.SGD(model, placement=placement, **MOMENTUM),
    "AdamW": lambda model, placement: gradcentral.AdamW(model, lr=0.01, placement=placement),
}
ALL = OURS | {
    "attached SGD": _attached(torch.optim.SGD, **MOMENTUM),
    "attached AdamW": _attached(torch.optim.AdamW, lr=0.01),
    "AdamW without kernels": lambda model, placement: gradcentral.AdamW(
        model, lr=0.01, placement=placement, fused=False
    ),
}


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(5, 1, 8, 8, generator=generator), torch.randint(3, (5,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def _train(model: nn.Module, step: Callable[[int], object], optimizer: Optimizer, count: int = 4) -> list[Tensor]:
    for number in range(count):
        optimizer.zero_grad()
        _loss(model, number).backward()
        step(number)
    return [p.detach().clone() for p in model.parameters()]


def _compile(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **options)
    return compiled


def _assert_equal(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for one, other in zip(compiled, eager, strict=True):
        # Adam divides by the root of a mean square that starts near zero: rounding errors are about lr · 2⁻²⁴ / ε.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "placement", "backend"),
    [(name, placement, "aot_eager") for name in ALL for placement in PLACEMENTS]
    # A compilation takes seconds, so each kind of centering is compiled once.
    + with_inductor(("SGD", "gradient"), ("SGD", "update"), ("attached SGD", "gradient"), ("attached AdamW", "update")),
)
def test_a_compiled_step_equals_the_eager_one(name: str, placement: str, backend: str) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    eager, compiled = ALL[name](model, placement), ALL[name](twin, placement)
    step = _compile(lambda: compiled.step(), backend, fullgraph="attached" not in name)
    _assert_equal(_train(twin, lambda _: step(), compiled), _train(model, lambda _: eager.step(), eager))
    gradients = [(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    _assert_equal([g for _, g in gradients if g is not None], [g for g, _ in gradients if g is not None])


@pytest.mark.parametrize(
    ("name", "placement", "backend"),
    [
        ("AdamW", "gradient", "aot_eager"),
        ("attached SGD", "update", "aot_eager"),
        *with_inductor(("attached SGD", "gradient")),
    ],
)
def test_a_whole_training_step_in_one_compiled_function_equals_the_eager_one(
    name: str, placement: str, backend: str
) -> None:
    def trained(backend: str | None) -> list[Tensor]:
        torch.manual_seed(1)
        model = Net()
        optimizer = ALL[name](model, placement)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        run = step if backend is None else _compile(step, backend)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            run(torch.randn(5, 1, 8, 8, generator=generator), torch.randint(3, (5,), generator=generator))
        return [p.detach() for p in model.parameters()]

    _assert_equal(trained(backend), trained(None))


@pytest.mark.parametrize("name", ["SGD", "attached AdamW"])
def test_a_compiled_model_trains_with_an_eager_optimizer(name: str) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    eager, other = ALL[name](model, "gradient"), ALL[name](twin, "gradient")
    forward: Any = torch.compile(twin, backend="aot_eager")
    assert set(forward.parameters()) == set(twin.parameters())
    _assert_equal(_train(forward, lambda _: other.step(), other), _train(model, lambda _: eager.step(), eager))


def test_a_compiled_model_has_the_same_layout_as_the_model() -> None:
    model = Net()
    compiled: Any = torch.compile(model, backend="aot_eager")
    layout = weight_layout(compiled)
    assert {p: layout[p] for p in layout} == dict(weight_layout(model).items())


@pytest.mark.parametrize(("kind", "placement"), [("SGD", "gradient"), ("AdamW", "update")])
def test_attaching_adds_no_graph_breaks(kind: str, placement: str) -> None:
    options = MOMENTUM if kind == "SGD" else {"lr": 0.01}
    breaks = []
    for attach in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = Net()
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        if attach:
            gradcentral.centralize(optimizer, model, placement)
        step = _compile(lambda optimizer=optimizer: optimizer.step())
        _train(model, lambda _, step=step: step(), optimizer)  # type: ignore[misc]
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[1] <= breaks[0]  # torch 2.14 counts one less with hooks


@pytest.mark.parametrize("name", ["SGD", "attached AdamW"])
def test_later_steps_do_not_recompile(name: str) -> None:
    model = Net()
    optimizer = ALL[name](model, "update")
    step = _compile(lambda: optimizer.step())
    _train(model, lambda _: step(), optimizer, 3)  # the first step creates the state, the second is compiled with it
    before = counters["frames"]["total"]
    with torch.compiler.set_stance("fail_on_recompile"):
        _train(model, lambda _: step(), optimizer, 3)
    assert counters["frames"]["total"] == before


def test_a_tensor_learning_rate_can_change_without_recompilation() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = Net()
        optimizer = gradcentral.SGD(model, **MOMENTUM | {"lr": torch.tensor(0.05)})
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = _compile(lambda: optimizer.step()) if compiled else optimizer.step

        def both(_: int) -> None:
            step()
            schedule.step()

        return _train(model, both, optimizer)

    _assert_equal(trained(True), trained(False))
    assert counters["stats"]["unique_graphs"] <= 2  # the first step creates the state


@pytest.mark.parametrize("name", ["AdamW without kernels", "attached SGD"])
@pytest.mark.parametrize(
    ("placement", "expected"), [("gradient", ["restore_means_"]), ("update", ["means", "restore_means_"])]
)
def test_centering_is_one_node_of_the_graph(name: str, placement: str, expected: list[str]) -> None:
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes]
        seen.extend(target.split(".")[1] for target in targets if target.startswith("gradcentral."))
        return graph.forward

    model = Net()
    optimizer = ALL[name](model, placement)
    _train(model, lambda _: _compile(lambda: optimizer.step(), look)(), optimizer, 1)
    assert seen == expected


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_step_centers_gradients_whose_elements_share_memory(placement: str, fused: bool) -> None:
    model = nn.Linear(4, 3, bias=False)
    gradient = torch.arange(6.0).square().unfold(0, 4, 1)
    expected = model.weight.detach() - 0.1 * center(gradient, "o [i]")
    if fused:
        optimizer: Optimizer = gradcentral.SGD(model, lr=0.1, placement=placement)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradcentral.centralize(optimizer, model, placement)
    model.weight.grad = gradient
    torch.compile(optimizer.step, backend="aot_eager")()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_centralize_gradients_can_be_compiled() -> None:
    model = Net()
    twin = copy.deepcopy(model)
    layout = weight_layout(twin)
    _loss(model, 0).backward()
    _loss(twin, 0).backward()
    centralize_gradients(model)
    _compile(lambda: centralize_gradients(layout=layout), fullgraph=True)()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


# The operators themselves.

VECTORS = [WeightVectors((1, 2, 3)), WeightVectors((1, 3), view=(2, 2, 3, 4)), WeightVectors((0,))]


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    tensors = [torch.randn(4, 3, 2, 2), torch.randn(4, 3, 4), torch.randn(6, 5)]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_traced_centering_equals_the_reference(dtype: torch.dtype) -> None:
    """The operators do not support complex tensors; these take the reference path in the same graph."""
    tensors = _tensors(dtype)
    pairs = [*zip(tensors, VECTORS, strict=True)]
    expected = [center(*pair) for pair in pairs]
    shifted = [(tensor + 1, vectors) for tensor, vectors in pairs]

    traced = compiled.TracedCentering()

    def both() -> None:
        means = traced.means(pairs)
        traced.restore_(shifted, means)
        traced.center_all_(pairs)

    before = [unit_means(*pair) for pair in pairs]
    _compile(both, fullgraph=True)()
    atol = 4 * torch.finfo(dtype).eps
    for (tensor, _), wanted in zip(pairs, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol)
    for pair, mean in zip(shifted, before, strict=True):
        torch.testing.assert_close(unit_means(*pair), mean, rtol=0, atol=atol)


def test_the_operators_pass_opcheck() -> None:
    tensors = _tensors(torch.float32)
    text = compiled.encode(VECTORS)
    ops = torch.ops.gradcentral
    torch.library.opcheck(ops.means.default, (tensors, text))
    torch.library.opcheck(ops.restore_means_.default, (tensors, None, text))
    torch.library.opcheck(ops.restore_means_.default, (tensors, ops.means(tensors, text), text))
    half = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(ops.restore_means_.default, (tensors, None, text, half))
    weights, l2 = [torch.randn_like(tensor) for tensor in tensors], [0.1, 0.0, 0.2]
    for scale in (None, torch.tensor(8.0, dtype=torch.float64)):
        for strength in (None, half):
            arguments = (tensors, weights, l2, scale, text, strength)
            torch.library.opcheck(ops.center_regularized_.default, arguments)


@pytest.mark.parametrize("rule", UpdateRule)
def test_the_operator_of_a_step_passes_opcheck(rule: UpdateRule) -> None:
    params = [*_tensors(torch.float32), torch.randn(5)]
    grads = [torch.randn_like(p) for p in params]
    moments = [[p.square() for p in params] for _ in range(3)]
    kinds = {UpdateRule.SGD: 0, UpdateRule.MOMENTUM: 1, UpdateRule.ADAM: 2, UpdateRule.AMSGRAD: 3}[rule]
    columns = [*moments[:kinds], *[[]] * (3 - kinds)]
    counters = [torch.ones(()) for _ in params] if kinds > 1 else []
    coefficients = [0.1, 0.01, 0.0, 0.9, 1.0, 0.0, 0.9, 0.999, 1e-8, 1.0, 0.5]
    fresh = [False] * len(params) if kinds == 1 else []
    arguments = (
        params,
        grads,
        *columns,
        counters,
        fresh,
        int(rule),
        1,
        compiled.encode([*VECTORS, None]),
        coefficients,
    )
    lr, found_inf = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.0)
    for tensors in ((None, None, None, None), (lr, lr, found_inf + 2, found_inf)):
        torch.library.opcheck(torch.ops.gradcentral.fused_step_.default, (*arguments, *tensors))


def test_every_operator_is_checked() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gradcentral")
    }
    tests = (test_the_operators_pass_opcheck, test_the_operator_of_a_step_passes_opcheck)
    source = "".join(inspect.getsource(test) for test in tests)
    assert registered == {name for name in registered if re.search(rf"opcheck\(\S*ops\S*\.{name}\.default", source)}
    assert registered == {"means", "restore_means_", "center_regularized_", "fused_step_"}


def test_weight_vectors_are_read_back_from_their_text() -> None:
    vectors = [None, *VECTORS, None]
    assert compiled.decode(compiled.encode(vectors)) == vectors
    assert compiled.decode(compiled.encode([None])) == [None]


def test_a_strength_is_an_input_of_the_graph_after_its_first_change() -> None:
    model = Net()
    optimizer = ALL["attached SGD"](model, "gradient")
    (handle,) = gradcentral.attached(optimizer)
    step = _compile(lambda: optimizer.step())
    for strength in (1.0, 0.5, 0.25):
        handle.strength = strength
        _train(model, lambda _: step(), optimizer, 2)
    graphs = counters["stats"]["unique_graphs"]
    for strength in (0.75, 0.3):
        handle.strength = strength
        with torch.compiler.set_stance("fail_on_recompile"):
            _train(model, lambda _: step(), optimizer, 1)
    assert counters["stats"]["unique_graphs"] == graphs


def test_restoring_means_requires_the_means_of_the_same_tensors() -> None:
    """The error names the operator to call first; after that, the call works."""
    tensor, vectors = torch.randn(7, 11), WeightVectors((1,))
    text = compiled.encode([vectors])
    with pytest.raises(RuntimeError, match="needs the result of gradcentral::means for the same tensors") as raised:
        torch.ops.gradcentral.restore_means_([tensor], torch.zeros(7, dtype=torch.float64), text)
    name = str(raised.value).partition("the result of gradcentral::")[2].split()[0]
    means = getattr(torch.ops.gradcentral, name)([tensor], text)
    shifted = tensor + 1
    torch.ops.gradcentral.restore_means_([shifted], means, text)
    torch.testing.assert_close(unit_means(shifted, vectors), unit_means(tensor, vectors))


def test_an_exported_model_contains_no_operator_of_gradcentral() -> None:
    """Centering is part of the step, not of the model; `center` in a model consists of torch's operators."""

    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, center(self.weight, "o [i]"), self.bias)

    model, x = Centered(4, 3), torch.randn(2, 4)
    gradcentral.SGD(model, lr=0.1)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "gradcentral" in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("make", [OURS["SGD"], ALL["attached SGD"]], ids=["ours", "attached"])
def test_gradients_may_be_views_of_larger_tensors(make: Callable[..., Optimizer]) -> None:
    """Such gradients, as in the buckets of DDP, have symbolic strides."""
    start = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    results = []
    for compile_it in (False, True):
        model = copy.deepcopy(start)
        optimizer = make(model, "gradient")
        step = torch.compile(optimizer.step, backend="eager") if compile_it else optimizer.step
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
            step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)
