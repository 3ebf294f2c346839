"""Compiled steps of gradcentral's optimizers: one operator per group, equal to the eager step, without copies."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import gradcentral
from gradcentral.kernels import planner
from gradcentral.optim import compiled
from gradcentral.optim.base import _COMPILES_KERNELS
from gradcentral.targets import PLACEMENTS
from tests.kernels.test_compiled import with_inductor
from tests.optim.test_fused import ALGORITHMS, needs_native, reference_path

# torch's compiler imports deprecated parts of torch.
pytestmark = [
    needs_native,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(not _COMPILES_KERNELS, reason="needs torch 2.13: older versions compile torch's step instead"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Net(nn.Module):
    """Rows in two memory formats, phases of strided filters, two more dtypes, and parameters that are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.up = nn.ConvTranspose2d(4, 2, 4, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.wide = nn.Linear(5, 3).double()
        self.narrow = nn.Linear(6, 3).bfloat16()


def _linear() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def _compiled(optimizer: Optimizer, backend: Any = "eager") -> Callable[[], Any]:
    step: Callable[[], Any] = torch.compile(lambda: optimizer.step(), backend=backend, fullgraph=True)
    return step


def _set_gradients(*models: nn.Module, seed: int = 0) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=numbers, dtype=torch.float64) + 0.5
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(gradient)


def _assert_same(optimizer: Optimizer, other: Optimizer, **tolerance: Any) -> None:
    """Compare parameters, gradients and states."""
    pairs = zip(*((p for group in o.param_groups for p in group["params"]) for o in (optimizer, other)), strict=True)
    exactly: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} | tolerance
    for p, q in pairs:
        torch.testing.assert_close(p, q, **exactly)
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
        torch.testing.assert_close(dict(optimizer.state.get(p, {})), dict(other.state.get(q, {})), **exactly)


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


NAMES = [name for name in ALGORITHMS if name not in ("sgd", "adam")]  # which are special cases of the others


@pytest.mark.parametrize(
    ("name", "placement"), [(name, PLACEMENTS[index % 3]) for index, name in enumerate(NAMES)], ids=str
)
def test_a_compiled_step_is_bit_identical_to_the_eager_one(name: str, placement: str) -> None:
    """Parameters of three dtypes in groups with different settings; the gradients stay as they are."""
    kind, options = ALGORITHMS[name]
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers: list[Any] = []
    for net in models:
        groups = [
            {"params": [*net.conv.parameters(), *net.up.parameters(), *net.narrow.parameters()]},
            {"params": net.wide.parameters(), "centralize": 0.25},
            {"params": net.norm.parameters(), "lr": options["lr"] * 2, "centralize": False},
        ]
        optimizers.append(getattr(gradcentral, kind)(groups, model=net, placement=placement, **options))
    eager, other = optimizers
    step = _compiled(other, "aot_eager")
    for seed in range(3):
        _set_gradients(*models, seed=seed)
        eager.step()
        step()
        _assert_same(eager, other)
    assert len(other._compiled) == 3, "the operator updates all groups"


@pytest.mark.parametrize(("name", "backend"), with_inductor(("momentum",), ("adamw amsgrad",)))
def test_the_generated_code_calls_the_operator_and_copies_nothing(name: str, backend: str) -> None:
    from torch._inductor.utils import run_and_get_code

    kind, options = ALGORITHMS[name]
    model = _linear()
    optimizer = getattr(gradcentral, kind)(model, **options)
    _set_gradients(model)
    optimizer.step()  # creates the state
    _, (code,) = run_and_get_code(_compiled(optimizer, backend))
    body = code[code.index("def call(") : code.index("runner = ")]
    assert body.count("torch.ops.gradcentral.fused_step_.default(") == 1
    assert "copy_" not in body
    assert "clone" not in body
    allocated = re.findall(r"empty_strided_cpu\((.*)\)", body)
    assert allocated == ["(), (), torch.float64"], "only the learning rate"


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_numbers_that_change_are_compiled_once_more(kind: str) -> None:
    """Dynamo takes a number for a constant until it changes for the first time."""
    models = [_linear(), _linear()]
    models[1].load_state_dict(models[0].state_dict())
    eager, other = (getattr(gradcentral, kind)(model, lr=0.1) for model in models)
    step = _compiled(other, "aot_eager")

    def train(seed: int, lr: float, strength: float) -> None:
        for optimizer in (eager, other):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.strength = strength
        _set_gradients(*models, seed=seed)
        eager.step()
        step()
        _assert_same(eager, other)

    train(0, 0.1, 1.0)
    train(1, 0.1, 1.0)
    assert _graphs() == 1
    train(2, 0.05, 1.0)
    assert _graphs() == 2
    train(3, 0.05, 0.5)
    assert _graphs() == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        train(4, 0.03, 0.25)
        train(5, 0.3, 0.7)
        train(6, 0.01, 0.125)
    assert _graphs() == 3


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The parameters of each plan that a compiled step creates."""
    found: list[object] = []
    group = planner.group_by_kernels
    monkeypatch.setattr(compiled, "group_by_kernels", lambda *of: (found.append(of[0]), group(*of))[1])  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["momentum dampened", "nesterov", "sgd l2", "adam l2", "adamw amsgrad", "amsgrad"])
def test_gradients_may_have_other_strides(name: str, placement: str, created: list[object]) -> None:
    """The operator copies them, and the kernel then takes the same step as with ordinary gradients."""
    kind, options = ALGORITHMS[name]
    models = [nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)]
    models[1].load_state_dict(models[0].state_dict())
    eager, other = (getattr(gradcentral, kind)(m, placement=placement, strength=0.75, **options) for m in models)
    step = _compiled(other)
    numbers = torch.Generator().manual_seed(0)
    for seed in range(5):
        gradient = torch.randn(4, 3, generator=numbers).t()
        if seed == 2:
            gradient = gradient[:1].expand(3, 4)  # whose rows share memory
        models[0].weight.grad = gradient.contiguous()
        models[1].weight.grad = gradient.contiguous() if seed == 3 else gradient
        eager.step()
        step()
        _assert_same(eager, other)
    assert len(created) == 1, "one plan serves gradients of all strides"


def test_what_the_kernels_no_longer_accept_is_refused_before_anything_changes() -> None:
    """The remedy in the message is followed. Dynamo guards neither the strides nor the layout of these tensors."""

    def transpose(p: Tensor) -> None:  # into a parameter with gaps between its elements
        p.data = torch.stack([p.detach(), p.detach()], dim=-1)[..., 0]
        p.grad = torch.ones(3, 4)

    def make_sparse(p: Tensor) -> None:
        p.grad = torch.ones(3, 4).to_sparse()

    for change in (transpose, make_sparse):
        torch._dynamo.reset()
        model = nn.ModuleList([nn.Linear(5, 2, bias=False), nn.Linear(4, 3, bias=False)])
        optimizer = gradcentral.SGD(model, lr=0.5, placement="update")
        step = _compiled(optimizer, "aot_eager")  # with "eager", an error in a compiled step leaves autograd off
        _set_gradients(model)
        step()
        change(model[1].weight)  # type: ignore[arg-type]
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"shape \(3, 4\).*torch\.compiler\.reset\(\)"):
            step()
        assert all(map(torch.equal, before, model.parameters()))
        torch.compiler.reset()
        for p in model.parameters():
            if p.grad is not None:
                p.grad = p.grad + torch.eye(*p.shape) if p.grad.layout == torch.strided else p.grad
        expected = [
            w - 0.5 * gradcentral.center(cast("Tensor", p.grad).to_dense(), "o [i]")
            for w, p in zip(before, model.parameters(), strict=True)
        ]
        torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")()
        for p, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), value)


def test_a_bfloat16_weight_is_rounded_once_if_its_gradient_has_other_strides() -> None:
    model = nn.Linear(4, 3, bias=False).bfloat16()
    w, gradient = model.weight.detach().float(), torch.randn(4, 3).bfloat16().t()
    model.weight.grad = gradient
    _compiled(gradcentral.SGD(model, lr=0.1))()
    expected = w - 0.1 * gradcentral.center(gradient.float(), "o [i]")
    assert torch.equal(model.weight.detach(), expected.bfloat16())


@pytest.mark.parametrize("name", ["momentum", "momentum dampened", "amsgrad", "adamw"])
def test_a_scaler_unscales_gradients_and_skips_steps(name: str) -> None:
    """The first step is skipped. With dampening, the next one is a first step, and torch's own step takes it."""
    kind, options = ALGORITHMS[name]
    models = [_linear(), _linear()]
    models[1].load_state_dict(models[0].state_dict())
    eager, other = (getattr(gradcentral, kind)(model, fused=True, **options) for model in models)
    other.step = torch.compile(other.step, backend="eager")
    data = torch.randn(5, 4)
    start = [p.detach().clone() for p in models[0].parameters()]
    for number, factor in enumerate([torch.inf, 1.0, 1.0, torch.nan, 1.0]):
        for optimizer, model in zip((eager, other), models, strict=True):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            optimizer.zero_grad()
            scaler.scale(model(data).square().sum() * factor).backward()
            scaler.step(optimizer)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            atol = 1e-6 if name == "momentum dampened" else 0
            torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=f"step {number}")
    assert not any(map(torch.equal, start, models[1].parameters()))


def test_plans_are_kept_between_steps_and_freed_with_the_optimizer(created: list[object]) -> None:
    model = _linear()
    optimizer: Any = gradcentral.AdamW(model)
    step = _compiled(optimizer)
    for seed in range(4):
        _set_gradients(model, seed=seed)
        step()
    assert len(created) == 1
    model[0].weight.data = model[0].weight.detach().clone()  # other memory
    step()
    assert len(created) == 2
    created.clear()
    weight, plans = weakref.ref(model[0].weight), weakref.ref(optimizer._compiled[0])
    del model, optimizer, step
    torch._dynamo.reset()
    gc.collect()
    assert plans() is None
    assert weight() is None


def test_one_compiled_function_serves_two_optimizers() -> None:
    step = torch.compile(lambda optimizer: optimizer.step(), backend="eager", fullgraph=True)
    models = [_linear() for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    placements = ("gradient", "update", "gradient", "update")
    optimizers = [
        gradcentral.SGD(model, lr=0.1, weight_decay=0.1, placement=placement)
        for model, placement in zip(models, placements, strict=True)
    ]
    for seed in range(3):
        _set_gradients(*models, seed=seed)
        for number, optimizer in enumerate(optimizers):
            if number < 2:
                optimizer.step()
            else:
                step(optimizer)
    _assert_same(optimizers[0], optimizers[2])
    _assert_same(optimizers[1], optimizers[3])
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_a_compiled_step_follows_changes() -> None:
    """An option of a group, a parameter without gradient, a new group, and a layer's own rule."""

    class Swapped(nn.Linear):
        weight_vectors: ClassVar[dict[str, str]] = {"weight": "[i] o"}

    models = [_linear(), _linear()]
    models[1].load_state_dict(models[0].state_dict())
    late = [nn.Parameter(torch.ones(2)) for _ in models]
    eager, other = (gradcentral.SGD(model, lr=0.1, momentum=0.9) for model in models)
    step = _compiled(other)

    def train(seed: int) -> None:
        _set_gradients(*models, seed=seed)
        for p in late:
            p.grad = torch.ones(2)
        if seed == 3:
            for model in models:
                model[1].bias.grad = None
        eager.step()
        step()
        _assert_same(eager, other)

    weights = []
    for seed in range(7):
        if seed == 2:
            for optimizer in (eager, other):
                optimizer.param_groups[0]["centralize"] = False
        if seed == 4:
            for optimizer in (eager, other):
                optimizer.param_groups[0]["centralize"] = True
        if seed == 5:
            for model, optimizer in zip(models, (eager, other), strict=True):
                model[0].__class__ = Swapped
                optimizer.layout.refresh()
                assert optimizer.layout[model[0].weight].span == (0,)
        if seed == 6:
            for p, model, optimizer in zip(late, models, (eager, other), strict=True):
                model.register_parameter("late", p)
                optimizer.add_param_group({"params": [p]})
        train(seed)
        weights.append(models[1][0].weight.detach().clone())
    changes = [new - old for old, new in pairwise(weights)]
    assert float(changes[0].mean(1).abs().max()) < 1e-6
    assert float(changes[1].mean(1).abs().max()) > 1e-3, "not centered"
    assert late[1].detach().tolist() == pytest.approx([0.9, 0.9])


def test_options_for_torchs_implementation_are_followed() -> None:
    """The graph then contains torch's operators, as in eager mode."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = _linear()
    _set_gradients(model)
    _compiled(gradcentral.SGD(model, lr=0.1, fused=False), look)()
    assert not any("fused_step_" in target for target in seen)
    seen.clear()
    with reference_path():
        _compiled(gradcentral.SGD(model, lr=0.1), look)()
    assert not any("fused_step_" in target for target in seen)
    _compiled(gradcentral.SGD(model, lr=0.1), look)()
    assert seen.count("gradcentral.fused_step_") == 1
