"""The fused optimizers equal the reference path (torch's step and projection.py) and can replace torch's optimizers."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral import WeightLayout, WeightVectors, weight_layout
from gradcentral.kernels import native
from gradcentral.targets import PLACEMENTS
from tests.strategies import shapes_and_vectors

needs_native = pytest.mark.skipif(
    bool(native.unavailable_reason()),
    reason=f"needs the native kernels ({native.unavailable_reason()}): install with a C compiler",
)


@contextmanager
def reference_path() -> Iterator[None]:
    """Turn the native kernels off."""
    before = native._unavailable
    native._unavailable = "turned off by a test"
    try:
        yield
    finally:
        native._unavailable = before


ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd l2": ("SGD", {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "momentum dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "maximize": ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam l2": ("Adam", {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw amsgrad": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "tensor lr": ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    "fused=True": ("AdamW", {"lr": 0.01, "fused": True}),
}
# Rounding differences accumulate over steps; in bfloat16, one rounding changes a weight by up to 2⁻⁸ of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def _make(name: str, params: Any, **gc: Any) -> Optimizer:
    kind, options = ALGORITHMS[name]
    optimizer: Optimizer = getattr(gradcentral, kind)(params, **options, **gc)
    return optimizer


def _train(optimizer: Optimizer, params: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.empty_like(p).copy_(g)  # with the parameter's strides, as autograd creates it
        optimizer.step()


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=20)
@given(
    drawn=st.lists(shapes_and_vectors(), min_size=1, max_size=3),
    placement=st.sampled_from(PLACEMENTS),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_fused_equals_reference_on_random_layouts(
    name: str,
    dtype: torch.dtype,
    drawn: list[tuple[tuple[int, ...], WeightVectors]],
    placement: str,
    seed: int,
    data: st.DataObject,
) -> None:
    """Draw rows, columns, grouped and strided units in any dense memory format, and uncentered parameters."""
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = []
    for shape, _ in drawn:
        order = data.draw(st.permutations(range(len(shape))))
        w = torch.randn(*(shape[axis] for axis in order), generator=generator, dtype=torch.float64)
        weights.append(w.permute(*(order.index(axis) for axis in range(len(shape)))).to(dtype))
    weights.append(torch.randn(5, generator=generator, dtype=torch.float64).to(dtype))
    gradients = [
        [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(dtype) + 0.5 for w in weights]
        for _ in range(3)
    ]
    vectors = [v for _, v in drawn]

    results = []
    for use in (None, reference_path):
        params = [nn.Parameter(w.clone()) for w in weights]
        model = nn.ParameterList(params)
        model.append(nn.Parameter(torch.zeros(2, 2)))  # so that every example has a centered parameter
        rules: dict[Any, Any] = {str(i): v for i, v in enumerate(vectors) if v.for_shape(weights[i].shape).fan_in > 1}
        layout = weight_layout(model, overrides={**rules, str(len(params)): WeightVectors((1,))})
        optimizer = _make(name, [*model], layout=layout, placement=placement)
        if use is None:
            _train(optimizer, params, gradients)
        else:
            with use():
                _train(optimizer, params, gradients)
        results.append([p.detach() for p in params])
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class Net(nn.Module):
    """Rows, columns, grouped units and parameters that are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        # There is no bias before the norm: its gradient is rounding noise, which Adam would scale up to full steps.
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.project = nn.Parameter(torch.randn(6, 5) / 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.norm(self.depthwise(torch.relu(self.conv(x)))))).mean((2, 3))
        y: Tensor = self.head(torch.relu(h @ self.project))
        return y


gradcentral.register_layout(Net, "project", WeightVectors((0,)))


def _steps(
    model: nn.Module, optimizer: Optimizer, count: int, dtype: torch.dtype = torch.float32, start: int = 0
) -> None:
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()


def _differ(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@needs_native
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("name", ["nesterov", "adamw", "adamw amsgrad"])
def test_fused_equals_reference_over_100_steps_of_a_network(name: str, placement: str, memory_format: Any) -> None:
    start: Any = Net().double()
    start = start.to(memory_format=memory_format)
    fused, reference = copy.deepcopy(start), copy.deepcopy(start)
    _steps(fused, _make(name, fused, placement=placement), 100, torch.float64)
    with reference_path():
        _steps(reference, _make(name, reference, placement=placement), 100, torch.float64)
    assert _differ(fused, start) > 1e-2
    assert _differ(fused, reference) < 1e-9


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_equals_centralize_on_torchs_optimizer(name: str, placement: str) -> None:
    ours, torchs = Net().double(), Net().double()
    torchs.load_state_dict(ours.state_dict())
    kind, options = ALGORITHMS[name]
    optimizer = getattr(torch.optim, kind)(torchs.parameters(), **options)
    gradcentral.centralize(optimizer, torchs, placement)
    _steps(ours, _make(name, ours, placement=placement), 5, torch.float64)
    _steps(torchs, optimizer, 5, torch.float64)
    assert _differ(ours, torchs) < 1e-11


@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "change", [lambda t: t.t_(), lambda t: t.as_strided_((4, 4), (1, 4))], ids=["t_", "as_strided_"]
)
def test_a_state_whose_strides_change_in_place_is_stepped_as_by_torch(
    key: str, change: Callable[[Tensor], Any]
) -> None:
    name, options = ("SGD", {"momentum": 0.9}) if key == "momentum_buffer" else ("AdamW", {})
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 4, bias=False)
        optimizer = getattr(gradcentral, name)(model, lr=0.1, fused=fused, **options)
        for step in range(4):
            model.weight.grad = torch.randn(4, 4)
            optimizer.step()
            if step == 1:
                change(optimizer.state[model.weight][key])
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


class _WithTable(nn.Module):
    """A table with sparse gradients behind a layer that is centered."""

    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.table = nn.EmbeddingBag(9, 4, sparse=True, mode="sum") if bag else nn.Embedding(9, 4, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(tokens))
        return output


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"amsgrad": True}),
        ("AdamW", {"fused": False}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"fused": True}),
        ("SGD", {"weight_decay": 0.1, "momentum": 0.9}),
        ("SGD", {"weight_decay": 0.1, "fused": False}),
        ("SGD", {"weight_decay": 0.1, "fused": True}),
    ],
    ids=str,
)
def test_sparse_gradients_are_refused_before_any_weight_changes(
    name: str, options: dict[str, Any], placement: str, groups: int, bag: bool
) -> None:
    model = _WithTable(bag)
    parts: Any = [{"params": [*model.head.parameters()]}, {"params": [*model.table.parameters()]}]
    params = parts if groups == 2 else model.parameters()
    optimizer = getattr(gradcentral, name)(params, lr=0.1, model=model, placement=placement, **options)
    model(torch.tensor([[1, 2]])).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"table.weight has a sparse gradient.*(SparseAdam|weight_decay=0)"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_remedies_for_sparse_gradients_work() -> None:
    """They are: a dense gradient, torch.optim.SparseAdam for Adam, and a group with weight_decay=0 for SGD."""
    for name, split in (("AdamW", True), ("SGD", True), ("AdamW", False), ("SGD", False)):
        model = _WithTable(bag=False)
        head, table = [*model.head.parameters()], [*model.table.parameters()]
        steps: list[Optimizer] = []
        if not split:
            model.table.sparse = False
            steps = [getattr(gradcentral, name)(model, lr=0.1, weight_decay=0.1)]
        elif name == "SGD":
            groups = [{"params": head}, {"params": table, "weight_decay": 0}]
            steps = [gradcentral.SGD(groups, lr=0.1, weight_decay=0.1, model=model)]
        else:
            steps = [gradcentral.AdamW(head, lr=0.1, model=model), torch.optim.SparseAdam(table, lr=0.1)]
        before = copy.deepcopy(model.state_dict())
        model(torch.tensor([[1, 2]])).sum().backward()
        for optimizer in steps:
            optimizer.step()
        changed = (model.table.weight != before["table.weight"]).any(1)
        assert changed[[1, 2]].all()
        assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_a_first_gradient_that_no_kernel_accepts_is_not_dampened(placement: str) -> None:
    model = nn.Linear(4, 3, bias=False)
    start = model.weight.detach().clone()
    optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9, dampening=0.5, placement=placement)
    model.weight.grad = torch.arange(4.0).expand(3, 4)
    optimizer.step()
    expected = start - 0.1 * (torch.arange(4.0) - 1.5)
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize("use", [None, reference_path])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_gradients_are_unchanged(use: Any, placement: str) -> None:
    model = Net()
    optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9, placement=placement)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients if g is not None]
    with use() if use else torch.enable_grad():
        optimizer.step()
    for p, g, v in zip(model.parameters(), gradients, values, strict=True):
        assert p.grad is g
        assert g is not None
        assert torch.equal(g, v)


# Drop-in replacement: signatures, checkpoints, copies, parameter groups, schedulers, closures, hooks.


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_the_signature_is_torchs_followed_by_our_arguments(kind: str) -> None:
    ours, torchs = getattr(gradcentral, kind), getattr(torch.optim, kind)
    assert issubclass(ours, torchs)
    names = list(inspect.signature(ours).parameters)
    assert names == [*inspect.signature(torchs).parameters, "model", "layout", "placement", "strength"]


def test_a_subclass_keeps_its_own_signature() -> None:
    class Mine(gradcentral.SGD):
        def __init__(self, params: Any, foo: int = 1) -> None:
            super().__init__(params, lr=0.1 * foo)

    assert list(inspect.signature(Mine).parameters) == ["params", "foo"]
    assert Mine(nn.Linear(4, 3), foo=2).defaults["lr"] == 0.2


def test_placement_and_layout_cannot_be_changed() -> None:
    model = nn.Linear(4, 3)
    optimizer = gradcentral.SGD(model, lr=0.1)
    handle = gradcentral.centralize(torch.optim.SGD(model.parameters()), model)
    for holder in (optimizer, handle):
        for name, value in (("placement", "update"), ("layout", weight_layout(model))):
            with pytest.raises(AttributeError):
                setattr(holder, name, value)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "adamw amsgrad"])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_checkpoints_load_in_both_directions(name: str, placement: str) -> None:
    kind, options = ALGORITHMS[name]
    model = Net().double()
    ours = _make(name, model, placement=placement)
    _steps(model, ours, 3, torch.float64)
    state = ours.state_dict()
    twin = copy.deepcopy(model)
    torchs = getattr(torch.optim, kind)(twin.parameters(), **options)
    assert state["param_groups"] == torchs.state_dict()["param_groups"]
    torchs.load_state_dict(copy.deepcopy(state))
    gradcentral.centralize(torchs, twin, placement)
    _steps(twin, torchs, 3, torch.float64, start=3)
    # And back: a checkpoint of torch's optimizer continues in gradcentral's.
    back = copy.deepcopy(twin)
    again = _make(name, back, placement=placement)
    again.load_state_dict(copy.deepcopy(torchs.state_dict()))
    _steps(model, ours, 6, torch.float64, start=3)
    _steps(back, again, 3, torch.float64, start=6)
    assert _differ(model, back) < 1e-11


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_centering(copier: Callable[[Any], Any]) -> None:
    model = Net().double()
    optimizer = gradcentral.AdamW(model, lr=0.01, placement="update")
    _steps(model, optimizer, 2, torch.float64)
    twin, twin_optimizer = copier((model, optimizer))
    assert twin_optimizer.placement == "update"
    assert twin.head.weight in twin_optimizer.layout
    _steps(model, optimizer, 2, torch.float64, start=2)
    _steps(twin, twin_optimizer, 2, torch.float64, start=2)
    assert _differ(model, twin) == 0


def test_a_copy_of_a_lazy_model_raises() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    twin, optimizer = copy.deepcopy((model, gradcentral.SGD(model, lr=0.1)))
    twin(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="this layout was copied"):
        optimizer.step()


def test_state_tensors_with_another_dtype_or_strides_are_detected() -> None:
    """Between two steps, a state tensor may be replaced by one with another dtype or other strides."""
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    optimizer = gradcentral.AdamW(model, lr=0.01)
    torchs = torch.optim.AdamW(reference.parameters(), lr=0.01)
    gradcentral.centralize(torchs, reference)
    for net, opt in ((model, optimizer), (reference, torchs)):
        _steps(net, opt, 1)
        for p in net.parameters():
            opt.state[p]["step"].data = opt.state[p]["step"].double()
        _steps(net, opt, 1, start=1)
        weight = net.head.weight
        opt.state[weight]["exp_avg"].data = opt.state[weight]["exp_avg"].t().contiguous().t()
        _steps(net, opt, 1, start=2)
    assert _differ(model, reference) < 1e-5
    assert float(optimizer.state[model.head.weight]["step"]) == 3
    weight = model.head.weight
    weight.grad = torch._neg_view(torch.ones_like(weight))
    before = weight.detach().clone()
    for p in model.parameters():
        if p is not weight:
            p.grad = None
    layout = weight_layout(model, exclude=["head.weight"])
    gradcentral.SGD([weight, model.conv.weight], lr=1.0, layout=layout).step()
    torch.testing.assert_close(weight.detach(), before + 1)


def test_replaced_tensors_are_detected() -> None:
    """A plan keeps no pointers: new data, new state and a new memory format take effect at the next step."""
    model, reference = Net().double(), Net().double()
    reference.load_state_dict(model.state_dict())
    optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9)
    with reference_path():
        plain = gradcentral.SGD(reference, lr=0.1, momentum=0.9)

    start = 0

    def both(count: int) -> None:
        nonlocal start
        _steps(model, optimizer, count, torch.float64, start)
        with reference_path():
            _steps(reference, plain, count, torch.float64, start)
        start += count

    both(2)
    for net in (model, reference):
        net.head.weight.data = net.head.weight.data.clone() * 2
        net.conv.weight.data = net.conv.weight.data.contiguous(memory_format=torch.channels_last)
    both(2)
    for opt in (optimizer, plain):
        opt.state.clear()
    both(2)
    for opt in (optimizer, plain):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    both(1)
    for net in (model, reference):
        net.project.requires_grad_(False)
        net.project.grad = None
    both(2)
    model.double().half().double()
    reference.double().half().double()
    both(1)
    assert _differ(model, reference) < 1e-11


def test_a_parameter_replaced_inside_the_list_of_its_group_is_updated_instead() -> None:
    """The list of parameters is the same object before and after, so a plan must keep a copy to compare with."""
    model = nn.ModuleList([nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)])
    old, new = model.parameters()
    optimizer = gradcentral.SGD([old], lr=0.1, model=model)
    for current in (old, new):
        optimizer.param_groups[0]["params"][0] = current
        before = old.detach().clone(), new.detach().clone()
        old.grad, new.grad = torch.randn(3, 4), torch.randn(3, 4)
        optimizer.step()
        assert torch.equal(old, before[0]) == (current is not old)
        assert torch.equal(new, before[1]) == (current is not new)


def test_parameter_groups_use_their_own_options() -> None:
    model, reference = Net().double(), Net().double()
    reference.load_state_dict(model.state_dict())

    def groups(net: Net) -> list[dict[str, Any]]:
        head = [*net.head.parameters()]
        rest = [p for p in net.parameters() if all(p is not q for q in head)]
        return [{"params": rest, "weight_decay": 0.1}, {"params": head, "lr": 0.5, "momentum": 0.0}]

    ours = gradcentral.SGD(groups(model), lr=0.1, momentum=0.9, model=model)
    torchs = torch.optim.SGD(groups(reference), lr=0.1, momentum=0.9)
    gradcentral.centralize(torchs, reference)
    _steps(model, ours, 3, torch.float64)
    _steps(reference, torchs, 3, torch.float64)
    assert _differ(model, reference) < 1e-12


def test_layers_added_later_are_centered() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = gradcentral.SGD(model, lr=0.1, placement="update")
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": [*model[2].parameters()], "lr": 0.01})
    before = [p.detach().mean(1) for p in model.parameters() if p.ndim == 2]
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    after = [p.detach().mean(1) for p in model.parameters() if p.ndim == 2]
    assert len(before) == 3
    for new, old in zip(after, before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-7)


def test_closures_hooks_and_schedulers_work_as_with_torch() -> None:
    model = nn.Linear(4, 3)
    optimizer = gradcentral.SGD(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(model.weight.grad))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    model(torch.randn(2, 4)).sum().backward()
    raw = model.weight.grad
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert len(seen) == 2
    assert seen[0] is raw

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("use", [None, reference_path])
def test_scaled_steps_are_unscaled_and_skipped_on_overflow(fused: bool | None, use: Any) -> None:
    """A GradScaler passes ``grad_scale`` and ``found_inf`` to fused optimizers, which must apply them."""
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    optimizer = gradcentral.AdamW(model, lr=0.01, fused=fused)
    torchs = torch.optim.AdamW(reference.parameters(), lr=0.01)
    gradcentral.centralize(torchs, reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(2, 3, 8, 8)
    with use() if use else torch.enable_grad():
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * torch.inf).backward()
        scaler.step(optimizer)
    reference(x).square().mean().backward()
    torchs.step()
    assert _differ(before, reference) < 1e-6
    assert _differ(model, before) == 0


def test_autograd_detects_in_place_steps() -> None:
    """As with torch's optimizers, a backward pass through weights that a step has changed raises."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = gradcentral.SGD(model, lr=0.1)
    loss = model(torch.randn(2, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_options_that_select_torchs_own_step_center_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.Plan, "run", lambda *_: pytest.fail("the fused kernel ran"))
    weight = torch.randn(3, 4)
    # A differentiable step changes the parameter in place, so the parameter must not be a leaf.
    p: Tensor = weight.clone().requires_grad_().clone() if "differentiable" in options else nn.Parameter(weight.clone())
    optimizer = gradcentral.SGD([p], lr=0.1, layout=WeightLayout.from_shapes([p]), **options)
    g = torch.randn(3, 4)
    if not p.is_leaf:
        p.retain_grad()
    p.grad = g.clone()
    optimizer.step()
    expected = weight - 0.1 * (g - g.mean(1, keepdim=True))
    torch.testing.assert_close(p.detach(), expected)


def test_sparse_and_expanded_gradients_take_torchs_step() -> None:
    model: Any = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = gradcentral.SGD(model, lr=0.1)
    before = copy.deepcopy(model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert (model[0].weight != before[0].weight).any(1).nonzero().flatten().tolist() == [1, 2]
    model[1].weight.grad = torch.ones(4).expand(2, 4)
    kept = model[1].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), kept)  # a constant gradient equals its mean
    layout = weight_layout(model, overrides={"0.weight": WeightVectors((1,))})
    kept = model[1].weight.detach().clone()
    model.zero_grad()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="0.weight has a sparse gradient"):
        gradcentral.SGD(model.parameters(), lr=0.1, layout=layout).step()
    assert torch.equal(model[1].weight.detach(), kept)  # raised before anything is updated
    by_shape = WeightLayout.from_shapes(model.parameters())
    with pytest.raises(ValueError, match="parameter 0 of shape .* has a sparse gradient.*pass model="):
        gradcentral.SGD(model.parameters(), lr=0.1, layout=by_shape).step()


@pytest.mark.parametrize("use", [None, reference_path])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_nan_stays_in_its_weight_vector(use: Any, placement: str) -> None:
    conv = nn.ConvTranspose2d(4, 3, 2)
    optimizer = gradcentral.AdamW(conv, lr=0.1, placement=placement)
    conv.weight.grad = torch.randn_like(conv.weight)
    conv.weight.grad[1, 2, 0, 1] = torch.nan
    with use() if use else torch.enable_grad():
        optimizer.step()
    assert conv.weight.isfinite().all((0, 2, 3)).tolist() == [True, True, False] if placement == "gradient" else True
    assert conv.weight[:, :2].isfinite().all()


# Errors and warnings.


def test_parameters_without_a_module_follow_the_shape_rule_with_a_warning() -> None:
    p, q = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 2))
    with pytest.warns(UserWarning, match=r"no module was found .* of shape \(3, 4\)"):
        optimizer = gradcentral.SGD([p], lr=0.1)
    with pytest.warns(UserWarning, match=r"no module was found .* of shape \(3, 4\), \(5, 2\)"):
        optimizer.add_param_group({"params": [q]})
    for parameter in (p, q):
        parameter.grad = torch.ones_like(parameter)
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q.detach(), before)


def test_invalid_arguments_raise() -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(ValueError, match="unknown placement"):
        gradcentral.SGD(model, lr=0.1, placement="weights")
    with pytest.raises(ValueError, match="pass the model once"):
        gradcentral.SGD(model, lr=0.1, model=other)
    with pytest.raises(ValueError, match="model or layout, not both"):
        gradcentral.SGD(model, lr=0.1, layout=weight_layout(model))
    with pytest.raises(ValueError, match="none of the model's parameters"):
        gradcentral.Adam(model.parameters(), model=other)
    with pytest.raises(ValueError, match="nothing is left to center"):
        gradcentral.Adam(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="momentun"):
        gradcentral.SGD(model, lr=0.1, momentun=0.9)
    with pytest.raises(ValueError, match="already centers"):
        gradcentral.centralize(gradcentral.SGD(model, lr=0.1), model)
