"""Optimizers inside wrappers, arguments of step that are no closure, and optimizers that cannot be hooked."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import Monitor, attached, centralize
from gradcentral.attach import centering_of

PLACEMENTS = ("gradient", "update")


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _backward(model: nn.Module, zero: bool = True) -> Tensor:
    if zero:
        model.zero_grad()
    loss: Tensor = (model(torch.rand(5, 4, dtype=torch.float64)) - 1).square().mean()
    torch.autograd.backward(loss)
    return loss


def _means(model: nn.Module) -> list[Tensor]:
    return [p.detach().mean(1) for p in model.parameters() if p.ndim == 2]


def _assert_means_kept(model: nn.Module, start: list[Tensor], before: Tensor) -> None:
    """SGD without weight decay keeps the means under both placements."""
    assert not torch.equal(model[0].weight, before)  # type: ignore[index]
    for now, then in zip(_means(model), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-13)


class SAM(Optimizer):
    """Sharpness-aware minimization, as in davda54/sam."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("by", ["two steps", "closure"])
@pytest.mark.parametrize("attach_to", ["wrapper", "base"])
def test_sam_is_centered_in_every_way_of_use(attach_to: str, by: str, placement: str) -> None:
    model = _model()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    handle = centralize(optimizer if attach_to == "wrapper" else optimizer.base_optimizer, model, placement)
    assert attached(optimizer) == attached(optimizer.base_optimizer) == [handle]
    start, before = _means(model), model[0].weight.detach().clone()
    for _ in range(3):
        _backward(model)
        if by == "closure":
            optimizer.step(lambda: _backward(model))
        else:
            optimizer.first_step()
            _backward(model)
            optimizer.second_step()
    _assert_means_kept(model, start, before)


def test_the_monitor_of_sam_records_the_steps_of_its_base() -> None:
    model = _model()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=1)
    for _ in range(3):
        _backward(model)
        optimizer.first_step()
        _backward(model)
        optimizer.second_step()
    assert [record.step for record in monitor.records] == [0, 1, 2]
    assert monitor.records[0].placement == "gradient"


def test_an_optimizer_that_corrects_its_base_after_the_step_raises() -> None:
    """WSAM, decoupled: its base optimizer takes one part of the step, and it adds another part afterwards."""
    model = _model()
    optimizer: Any = SAM(model.parameters(), SGD, lr=0.1)
    optimizer.decouple = True
    with pytest.raises(ValueError, match="create it with decouple=False"):
        centralize(optimizer, model)
    optimizer.decouple = False
    handle = centralize(optimizer, model)
    assert attached(optimizer.base_optimizer) == [handle]


class Plain:
    """A wrapper that is not a torch optimizer, as in fastai, mmengine and schedulefree."""

    def __init__(self, name: str, inner: Any) -> None:
        setattr(self, name, inner)
        self._name = name

    def step(self) -> None:
        getattr(self, self._name).step()


class Hookless(Optimizer):
    """A torch optimizer without step hooks, as in accelerate and Opacus."""

    def __init__(self, name: str, inner: Any) -> None:  # without super().__init__()
        setattr(self, name, inner)
        self._name = name

    def step(self) -> None:  # type: ignore[override]
        getattr(self, self._name).step()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("wrapper", [Plain, Hookless])
@pytest.mark.parametrize("name", ["optimizer", "original_optimizer", "_optimizer", "opt", "optim", "base"])
def test_wrappers_without_hooks_are_followed(name: str, wrapper: Any, placement: str) -> None:
    model = _model()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = wrapper("optimizer", wrapper(name, inner))
    handle = centralize(optimizer, model, placement)
    assert attached(inner) == attached(optimizer) == [handle]
    assert [targets.layout for targets in centering_of(optimizer)] == [handle.layout]
    start, before = _means(model), model[0].weight.detach().clone()
    _backward(model)
    optimizer.step()
    _assert_means_kept(model, start, before)


class Projecting(Optimizer):
    """A wrapper with hooks that changes the gradients before the inner step (OrthoGrad)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self) -> None:  # type: ignore[override]
        self.received = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        self.optimizer.step()


def test_a_wrapper_with_hooks_receives_centered_gradients() -> None:
    model = _model()
    optimizer = Projecting(SGD(model.parameters(), lr=0.1))
    handle = centralize(optimizer, model)
    assert attached(optimizer) == [handle]
    assert attached(optimizer.optimizer) == []
    _backward(model)
    optimizer.step()
    assert all(g.mean(1).abs().max() < 1e-15 for g in optimizer.received if g.ndim == 2)


def test_wrappers_around_no_torch_optimizer_raise_with_a_remedy() -> None:
    wrappers: list[Any] = [Plain("opt", object()), Hookless("optimizer", None), object(), SGD]
    for optimizer in wrappers:
        model = _model()
        with pytest.raises(TypeError, match="for another kind of optimizer") as raised:
            centralize(optimizer, model)
        found = re.search("call (.+) once, or (.+) before each step", str(raised.value))
        assert found
        _backward(model)
        eval(found[2])
        assert model[0].weight.grad.mean(1).abs().max() < 1e-15
        model[0].weight.grad = None
        eval(found[1])
        _backward(model)
        assert model[0].weight.grad.mean(1).abs().max() < 1e-15
    loop = Plain("opt", None)
    loop.opt = loop  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer with step hooks, not Plain"):
        centralize(loop, model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hold"),
    [
        ("optimizers", lambda one, other: [one, other]),
        ("chained", lambda one, other: (Plain("optimizer", one), other)),
        ("by_name", lambda one, other: {"body": one, "head": other}),
        ("inner_opt", lambda one, other: one),
    ],
)
def test_the_remedy_for_an_object_that_holds_optimizers_works(name: str, hold: Callable[..., Any]) -> None:
    model = _model()
    optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    optimizer: Any = Plain(name, hold(*optimizers))
    with pytest.raises(TypeError, match=f"attach to what it holds: gradcentral.*{name}") as raised:
        centralize(optimizer, model)
    handle = eval(str(raised.value).split("it holds: ")[1])
    assert attached(optimizers[0]) == [handle]
    assert name == "inner_opt" or attached(optimizers[1]) == [handle]


# Arguments of step that are no closure, and closures that are not called.


class WithLoss(Optimizer):
    """An optimizer whose step takes something else than a closure first, such as the loss (Polyak's step size)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, loss: Any = None, closure: Any = None) -> Any:  # type: ignore[override]
        self.received = loss
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["tensor", "number", "module", "None"])
@pytest.mark.parametrize("how", ["positional", "keyword", "with closure"])
def test_a_first_argument_that_is_no_closure_is_passed_on(how: str, kind: str, placement: str) -> None:
    model = _model()
    optimizer = WithLoss(model.parameters())
    centralize(optimizer, model, placement)
    monitor = Monitor(model, optimizer, every=1)
    start, before = _means(model), model[0].weight.detach().clone()
    loss = _backward(model)
    argument = {"tensor": loss, "number": loss.item(), "module": model, "None": None}[kind]
    if how == "positional":
        result = optimizer.step(argument)
    elif how == "keyword":
        result = optimizer.step(loss=argument)
    else:
        result = optimizer.step(argument, closure=lambda: _backward(model))
    assert result is optimizer.received is argument
    _assert_means_kept(model, start, before)
    assert len(monitor.records) == 1
    assert monitor.records[0].net.share is not None
    assert monitor.records[0].net.share > 1e-3


class IgnoresClosures(Optimizer):
    """An optimizer that accepts a closure and calls it only every ``every`` steps (0: never)."""

    def __init__(self, params: Any, every: int = 0) -> None:
        super().__init__(params, {"lr": 0.1})
        self.every, self.steps = every, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_steps_that_ignore_their_closure_are_centered(placement: str) -> None:
    model = _model()
    optimizer = IgnoresClosures(model.parameters())
    centralize(optimizer, model, placement)
    monitor = Monitor(model, optimizer, every=1)
    start, before = _means(model), model[0].weight.detach().clone()
    for _ in range(3):
        _backward(model)
        optimizer.step(lambda: _backward(model))
    _assert_means_kept(model, start, before)
    assert [record.step for record in monitor.records] == [0, 1, 2]
    assert all((record.net.share or 0) > 1e-3 for record in monitor.records)


def test_a_closure_that_adds_to_the_gradients_is_centered() -> None:
    model = _model()
    optimizer = IgnoresClosures(model.parameters(), every=1)
    centralize(optimizer, model)
    start, before = _means(model), model[0].weight.detach().clone()
    for _ in range(3):
        _backward(model)
        optimizer.step(lambda: _backward(model, zero=False))
    _assert_means_kept(model, start, before)


def test_a_closure_receives_the_gradients_as_they_are() -> None:
    """Lightning's closure adds the last micro-batch to the gradients and clips the sum."""
    torch.manual_seed(0)
    model, batches = _model(), torch.rand(3, 2, 5, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)

    def add_and_clip(net: Any, batch: Tensor, clip: bool) -> None:
        (net(batch) - 1).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)

    optimizer, by_hand = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    centralize(optimizer, model)
    for first, second in batches:
        for net, one in ((model, optimizer), (plain, by_hand)):
            one.zero_grad()
            add_and_clip(net, first, clip=False)
        optimizer.step(lambda second=second: add_and_clip(model, second, clip=True))
        add_and_clip(plain, second, clip=True)
        gradcentral.centralize_gradients(plain)
        by_hand.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class ZeroesInStep(SGD):
    """An optimizer that sets the gradients to zero in place before it calls the closure, which adds to them."""

    def step(self, closure: Any = None) -> Any:
        self.zero_grad(set_to_none=False)
        return super().step(closure)


def test_gradients_that_the_optimizer_changes_before_the_closure_stay_changed() -> None:
    torch.manual_seed(0)
    model, batch = _model(), torch.rand(5, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)

    def add(net: Any) -> None:
        (net(batch) - 1).square().mean().backward()

    optimizer = ZeroesInStep(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    _backward(model)
    optimizer.step(lambda: add(model))
    add(plain)
    gradcentral.centralize_gradients(plain)
    SGD(plain.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class BackwardInStep(Optimizer):
    """An optimizer that computes the gradients itself: its step takes the loss, or a closure without backward()."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, loss: Any = None) -> None:  # type: ignore[override]
        self.zero_grad()
        (loss() if callable(loss) else loss).backward()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("kind", ["loss", "closure"])
def test_gradients_computed_inside_the_step_raise_and_the_remedy_works(kind: str) -> None:
    model = _model()
    optimizer = BackwardInStep(model.parameters())
    handle = centralize(optimizer, model)

    def loss() -> Any:
        return (model(torch.rand(5, 4, dtype=torch.float64)) - 1).square().mean()

    argument = loss if kind == "closure" else loss()
    with pytest.raises(RuntimeError, match=r"computed inside it .* use placement='update'"):
        optimizer.step(argument)
    handle.remove()
    centralize(optimizer, model, placement="update")
    start, before = _means(model), model[0].weight.detach().clone()
    optimizer.step(loss if kind == "closure" else loss())
    _assert_means_kept(model, start, before)


def test_a_closure_that_is_called_in_some_steps_only_raises() -> None:
    model = _model()
    optimizer = IgnoresClosures(model.parameters(), every=2)
    centralize(optimizer, model)
    _backward(model)
    for _ in range(2):
        optimizer.step(lambda: _backward(model))
    with pytest.raises(RuntimeError, match="call backward\\(\\) before step\\(\\) or in the closure"):
        optimizer.step(lambda: _backward(model))


def test_a_skipped_batch_does_not_raise() -> None:
    """Lightning calls step with a closure that computes nothing if a batch is skipped."""
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    for closure in (lambda: None, lambda: _backward(model), lambda: optimizer.zero_grad()):
        optimizer.step(closure)


def test_hooks_of_others_see_the_arguments_that_torch_defines() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *call: seen.append(call))
    optimizer.register_step_post_hook(lambda *call: seen.append(call))
    _backward(model)
    optimizer.step(closure=lambda: _backward(model))
    for instance, args, kwargs in seen:
        assert instance is args[0] is optimizer
        assert len(args) == 1
        assert kwargs.keys() == {"closure"}


# Optimizers that cannot be hooked.


class ScheduleFree(SGD):
    def train(self) -> None: ...

    def eval(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.1)  # another sequence, whose means have drifted


class ScheduleFreeWrapper(Plain):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_placement_update_refuses_schedule_free_optimizers() -> None:
    model = _model()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    for wrapped in (optimizer, Plain("opt", optimizer), Projecting(optimizer)):
        with pytest.raises(ValueError, match="ScheduleFree keeps a second .*'gradient', or a block") as raised:
            centralize(wrapped, model, "update")  # type: ignore[arg-type]
    found = re.search("use (placement='gradient')", str(raised.value))
    assert found
    eval(f"centralize(optimizer, model, {found[1]})", globals(), {"optimizer": optimizer, "model": model})
    (handle,) = attached(optimizer)
    handle.remove()
    block = re.search(r"with gradcentral\.centered_update\(model\):", str(raised.value))
    assert block
    start, before = _means(model), model[0].weight.detach().clone()
    _backward(model)
    for call in ("step", "eval"):
        exec(f"{block[0]} optimizer.{call}()", globals(), {"optimizer": optimizer, "model": model})
        _assert_means_kept(model, start, before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_optimizer_of_accelerate_is_followed(placement: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: run `make trainers`")
    model = _model()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(SGD(model.parameters(), lr=0.1))
    handle = centralize(optimizer, model, placement)
    assert attached(optimizer.optimizer) == [handle]
    start, before = _means(model), model[0].weight.detach().clone()
    _backward(model)
    optimizer.step()
    _assert_means_kept(model, start, before)
    wrapped = accelerator.prepare_optimizer(ScheduleFree(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="ScheduleFree keeps a second"):
        centralize(wrapped, model, "update")


def test_placement_update_names_the_optimizer_inside_a_schedule_free_wrapper() -> None:
    model = _model()
    optimizer = ScheduleFreeWrapper("base", SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="use placement='gradient', gradcentral.centralize") as raised:
        centralize(optimizer, model, "update")  # type: ignore[arg-type]
    handle = eval(str(raised.value).split("'gradient', ")[1].split(", or ")[0])
    assert handle.placement == "update"
    assert attached(optimizer) == [handle]  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "name"), [("SGD", "SGD"), ("AdamW", "AdamW"), ("Adam", "Adam"), ("NAdam", "SGD")])
def test_differentiable_steps_raise_and_the_remedy_has_the_right_derivative(kind: str, name: str) -> None:
    model = _model()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=r"use gradcentral.\w+\(model, differentiable=True\)") as raised:
        centralize(optimizer, model)
    found = re.search(r"use gradcentral.(\w+)\(model, (differentiable=True)\)", str(raised.value))
    assert found
    assert found[1] == name
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    p = weight.clone()
    p.grad = gradient = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    layout = gradcentral.WeightLayout.from_shapes([p])
    eval(f"gradcentral.SGD([p], lr=0.5, layout=layout, {found[2]})").step()
    probe = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    (derivative,) = torch.autograd.grad((p * probe).sum(), gradient)
    torch.testing.assert_close(derivative, -0.5 * gradcentral.center(probe, layout[p]), rtol=0, atol=1e-14)


def test_groups_that_become_differentiable_raise() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    optimizer.param_groups[0]["differentiable"] = True
    _backward(model)
    with pytest.raises(ValueError, match="differentiable=True"):
        optimizer.step()
