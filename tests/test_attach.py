"""`centralize` on an optimizer: hooks, closures, pausing, copies, checkpoints, and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import gradcentral
from gradcentral import WeightLayout, WeightVectors, attached, center, centralize, centralize_gradients, weight_layout
from gradcentral.local_shard import overlaps_itself

ROWS = WeightVectors((1,))


def _model() -> Any:  # nn.Sequential: its layers have no typed `weight`
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def _loss(model: nn.Module) -> Tensor:
    x = torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10
    output: Tensor = model(x)
    return (output - 1).square().mean()


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    torch.autograd.backward(_loss(model))


def _means(model: nn.Module) -> list[Tensor]:
    return [p.detach().mean(1) for p in model.parameters() if p.ndim == 2]


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_placement_gradient_passes_centered_gradients_to_the_optimizer() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    _backward(model)
    expected = [
        center(p.grad, ROWS) if p.ndim == 2 else p.grad.clone() for p in model.parameters() if p.grad is not None
    ]
    before = _weights(model)
    optimizer.step()
    for p, w, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-15)
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=0, atol=1e-15)
    assert handle.layout[model[0].weight].span == (1,)
    assert handle.placement == "gradient"


def test_placement_update_leaves_gradients_unchanged_and_keeps_the_means() -> None:
    model = _model()
    optimizer = Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    centralize(optimizer, model, "update")
    _backward(model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before, means = _weights(model), _means(model)
    optimizer.step()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    for new, old in zip(_means(model), means, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-15)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_gradients_are_centered_in_place(placement: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model, placement)
    _backward(model)
    before = [p.grad for p in model.parameters()]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


# Closures compute the gradients inside step().


def _closure_steps(optimizer: Optimizer, model: nn.Module, how: str) -> None:
    def closure() -> float:
        _backward(model)
        return _loss(model).item()

    for _ in range(3):
        if how == "keyword":
            loss = optimizer.step(closure=closure)
        elif how == "positional":
            loss = optimizer.step(closure)
        else:
            closure()
            optimizer.step(None)  # accelerate passes None
            continue
        assert isinstance(loss, float)


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("how", ["positional", "keyword", "None"])
def test_steps_with_a_closure_equal_steps_without(how: str, placement: str) -> None:
    plain, closed = _model(), _model()
    closed.load_state_dict(plain.state_dict())
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    centralize(optimizer, plain, placement)
    for _ in range(3):
        _backward(plain)
        optimizer.step()
    optimizer = SGD(closed.parameters(), lr=0.1, momentum=0.9)
    centralize(optimizer, closed, placement)
    _closure_steps(optimizer, closed, how)
    for one, other in zip(plain.parameters(), closed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_keeps_the_means(line_search: str | None) -> None:
    model = _model()
    start = _means(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8, line_search_fn=line_search)
    centralize(optimizer, model)
    first = _loss(model).item()
    _closure_steps(optimizer, model, "positional")
    assert _loss(model).item() < first
    # Its directions are linear combinations of centered gradients.
    for new, old in zip(_means(model), start, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


# The handle.


def test_remove_ends_centering_and_can_be_called_twice() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    for placement in ("gradient", "update"):
        handle = centralize(optimizer, model, placement)
        assert attached(optimizer) == [handle]
        handle.remove()
        handle.remove()
        assert attached(optimizer) == []
        assert "removed" in repr(handle)
        _backward(model)
        raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        before = _weights(model)
        optimizer.step()
        for p, w, g in zip(model.parameters(), before, raw, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=0, atol=1e-15)


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_paused_steps_do_not_center(placement: str) -> None:
    model, reference = _model(), _model()
    reference.load_state_dict(model.state_dict())
    optimizer, plain = SGD(model.parameters(), lr=0.1), SGD(reference.parameters(), lr=0.1)
    handle = centralize(optimizer, model, placement)
    for net, opt in ((model, optimizer), (reference, plain)):
        _backward(net)
        with handle.paused(), handle.paused():
            assert "paused" in repr(handle)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    start = _means(model)
    _backward(model)
    optimizer.step()
    assert "active" in repr(handle)
    assert all(torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True))


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_pause_and_resume(placement: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model, placement)

    def centers() -> bool:
        _backward(model)
        start = _means(model)
        optimizer.step()
        return all(torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True))

    assert centers()
    handle.pause()
    handle.pause()
    assert "paused" in repr(handle)
    assert not centers()
    with handle.paused():
        assert not centers()
    assert not centers()  # the block does not resume
    handle.resume()
    assert "active" in repr(handle)
    assert centers()
    with handle.paused():
        handle.resume()
        assert not centers()  # until the block ends
    assert centers()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_handle_is_attached_to_nothing(copier: Any) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    twin = copier(handle)
    assert "not attached" in repr(twin)
    twin.pause()
    twin.remove()
    assert "active" in repr(handle)
    assert attached(optimizer) == [handle]


# Several optimizers of one model.


def test_several_optimizers_have_one_handle() -> None:
    model = _model()
    one, two = SGD(model[0].parameters(), lr=0.1), Adam(model[2].parameters(), lr=0.1)
    handle = centralize([one, two], model, "update")
    assert attached(one) == attached(two) == [handle]
    assert "active on 2 optimizers" in repr(handle)
    assert centralize((one, two), model, "update") is centralize(two, model, "update") is handle

    def step() -> list[bool]:
        _backward(model)
        start = _means(model)
        one.step()
        two.step()
        return [torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True)]

    assert step() == [True, True]
    with handle.paused():
        assert step() == [False, False]
    assert step() == [True, True]
    handle.remove()
    assert attached(one) == attached(two) == []
    assert step() == [False, False]


def test_only_optimizers_that_all_have_nothing_to_center_raise() -> None:
    model = _model()
    weights, rest = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
    one, two = SGD(weights, lr=0.1), SGD(rest, lr=0.1)
    with pytest.raises(ValueError, match=r"nothing is left to center in this optimizer .*\(0.bias") as raised:
        centralize(two, model)
    found = re.search(r"together, (.+)$", str(raised.value))
    assert found
    handle = eval(
        found[1].replace("...", "one"), {"gradcentral": gradcentral, "optimizer": two, "one": one, "model": model}
    )
    assert attached(one) == [handle]
    handle.remove()
    with pytest.raises(ValueError, match=r"nothing is left to center"):
        centralize([SGD(rest[:1], lr=0.1), SGD(rest[1:], lr=0.1)], model)
    with pytest.raises(ValueError, match=r"none of the model's parameters is in the optimizer"):
        centralize([one, two], copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"the list of optimizers is empty: call centralize after they"):
        centralize([], model)
    assert attached(one) == attached(two) == []


def test_several_optimizers_of_which_one_is_centered_otherwise_raise() -> None:
    model = _model()
    optimizer = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    first = centralize(optimizer[1], model)
    for placement in ("gradient", "update"):  # the first optimizer is not centered yet
        with pytest.raises(ValueError, match="2.weight is already centered") as raised:
            centralize(optimizer, model, placement)
    assert attached(optimizer[0]) == []
    exec(str(raised.value).split("first: ")[1], {"gradcentral": gradcentral, "optimizer": optimizer})
    assert attached(optimizer[1]) == []
    assert "removed" in repr(first)
    centralize(optimizer, model)


def test_one_optimizer_per_parameter_that_steps_in_backward() -> None:
    model = _model()
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}
    for p, optimizer in optimizers.items():
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    handle = centralize([*optimizers.values()], model)
    start, before = _means(model), _weights(model)
    for _ in range(3):
        _backward(model)
    assert "active on 4 optimizers" in repr(handle)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert all(torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True))


def test_the_handle_creates_no_reference_cycle_with_the_optimizer() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    handle.remove()


def test_deleting_model_optimizer_and_handle_releases_the_parameters_at_once() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    _backward(model)
    optimizer.step()
    parameter = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del model, optimizer, handle
        assert parameter() is None
    finally:
        gc.enable()


def test_attaching_again_with_the_same_settings_returns_the_same_handle() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    assert centralize(optimizer, model) is handle
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_attaching_again_with_other_settings_raises() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    with pytest.raises(ValueError, match=r"0.weight is already centered in this optimizer \(placement 'gradient'"):
        centralize(optimizer, model, "update")
    with pytest.raises(ValueError, match="already centered in this optimizer"):
        centralize(optimizer, layout=weight_layout(model, exclude=["2.weight"]))


def test_two_models_can_share_an_optimizer() -> None:
    one, two = _model(), _model()
    optimizer = SGD([*one.parameters(), *two.parameters()], lr=0.1)
    centralize(optimizer, one)
    _backward(one)
    _backward(two)
    optimizer.step()
    assert two[0].weight.grad is not None
    assert two[0].weight.grad.mean(1).abs().max() > 1e-6
    centralize(optimizer, two, "update")
    assert len(attached(optimizer)) == 2


# Copies, checkpoints, parameter groups.


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_an_optimizer_have_no_hooks_as_in_torch(copier: Any) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    twin = copier(optimizer)
    assert attached(twin) == []
    assert len(attached(optimizer)) == 1


def test_a_copied_model_and_optimizer_can_be_attached_again() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    centralize(optimizer, model)
    _backward(model)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    centralize(twin_optimizer, twin)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        _backward(net)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_state_dict_is_that_of_torch_and_loads_in_both_directions(placement: str) -> None:
    model, reference = _model(), _model()
    plain = Adam(reference.parameters())
    optimizer = Adam(model.parameters())
    centralize(optimizer, model, placement)
    _backward(model)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert state["param_groups"] == plain.state_dict()["param_groups"]
    plain.load_state_dict(state)
    optimizer.load_state_dict(plain.state_dict())
    start = _means(model)
    _backward(model)
    optimizer.step()
    assert len(attached(optimizer)) == 1
    if placement == "update":
        assert all(torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True))


def test_layers_added_later_are_centered() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    model.append(nn.Linear(3, 2).double())
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.01})
    _backward(model)
    optimizer.step()
    assert "3.weight" in handle.layout
    assert model[3].weight.grad is not None
    assert model[3].weight.grad.mean(1).abs().max() < 1e-15


def test_parameters_of_another_model_added_later_warn_once() -> None:
    model, other = _model(), _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    optimizer.add_param_group({"params": other.parameters()})
    _backward(model)
    with pytest.warns(UserWarning, match=r"not in the model, of shape \(6, 4\).*centralize\(optimizer, their_model\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_lazy_models_are_centered_from_the_first_step(placement: str) -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model, placement)
    assert not handle.layout
    _backward(model)
    start = _means(model)
    optimizer.step()
    assert len(handle.layout) == 2
    assert all(torch.allclose(m, s, rtol=0, atol=1e-15) for m, s in zip(_means(model), start, strict=True))


def test_lazy_parameters_with_a_closure_and_placement_update_raise() -> None:
    model = nn.Sequential(nn.LazyLinear(3)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model, "update")
    with pytest.raises(RuntimeError, match="run one forward"):
        _closure_steps(optimizer, model, "positional")


def test_learning_rate_schedulers_work() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _backward(model)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_steps_are_centered_and_skipped_on_overflow(fused: bool) -> None:
    """Φ is linear, so the gradient may be centered before a fused optimizer unscales it."""
    model, reference = _model().float(), _model().float()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    optimizer, plain = SGD(model.parameters(), lr=0.1, fused=fused), SGD(reference.parameters(), lr=0.1)
    centralize(optimizer, model)
    centralize(plain, reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    reference(x).square().mean().backward()
    plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    before = _weights(model)
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


# Unusual gradients and parameters.


def test_expanded_gradients_are_centered_out_of_place() -> None:
    model = nn.Linear(4, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    shared = torch.arange(4.0).expand(3, 4)
    model.weight.grad = shared
    optimizer.step()
    assert torch.equal(model.weight.grad, torch.tensor([-1.5, -0.5, 0.5, 1.5]).expand(3, 4))
    assert torch.equal(shared[0], torch.arange(4.0))


OVERLAPPING: dict[str, Callable[[], Tensor]] = {
    "expand": lambda: torch.arange(4.0).square().expand(3, 4),
    "as_strided": lambda: torch.arange(6.0).square().as_strided((3, 4), (1, 1)),
    "unfold": lambda: torch.arange(6.0).square().unfold(0, 4, 1),
    "unfold with gaps": lambda: torch.arange(8.0).square().unfold(0, 4, 2),
    "circulant": lambda: torch.arange(9.0).square().as_strided((3, 4), (1, 2)),
}


@pytest.mark.parametrize("make", OVERLAPPING.values(), ids=OVERLAPPING.keys())
@pytest.mark.parametrize("route", ["attached", "attached update", "fused", "fused update", "in place"])
def test_gradients_whose_elements_share_memory_are_centered(make: Callable[[], Tensor], route: str) -> None:
    model = nn.Linear(4, 3, bias=False)
    gradient = make()
    kept = gradient.clone()
    change = -0.1 * (kept - kept.mean(1, keepdim=True))
    start = model.weight.detach().clone()
    placement = "update" if "update" in route else "gradient"
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    if "attached" in route:
        centralize(optimizer, model, placement)
    elif route != "in place":
        optimizer = gradcentral.SGD(model, lr=0.1, placement=placement)
    model.weight.grad = gradient
    if route == "in place":
        centralize_gradients(model)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), start + change)
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4),
        torch.zeros(4, 3).T,
        torch.zeros(6, 8)[::2, 1::3],
        torch.zeros(1, 4).expand(1, 4),
        torch.ones(()),
    ],
)
def test_dense_and_sliced_tensors_do_not_overlap(tensor: Tensor) -> None:
    assert not overlaps_itself(tensor)


def test_sparse_gradients_raise_with_the_name_and_a_remedy() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    layout = weight_layout(model, overrides={"0.weight": ROWS})
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, layout=layout)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"0.weight has a sparse gradient.*exclude=\['0.weight'\]"):
        optimizer.step()


def test_sparse_embeddings_are_skipped_by_default() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_parameters_without_a_gradient_are_unchanged(placement: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    centralize(optimizer, model, placement)
    before = _weights(model)
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_nan_stays_in_its_weight_vector(placement: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model, placement)
    _backward(model)
    assert model[0].weight.grad is not None
    model[0].weight.grad[2, 1] = torch.nan
    optimizer.step()
    finite = model[0].weight.isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_complex_and_channels_last_parameters_are_centered() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    model = model.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    strides = model[0].weight.grad.stride()
    optimizer.step()
    assert model[0].weight.grad.stride() == strides
    assert model[0].weight.grad.mean((1, 2, 3)).abs().max() < 1e-6
    linear = nn.Linear(4, 2, dtype=torch.complex64)
    optimizer = SGD(linear.parameters(), lr=0.1)
    centralize(optimizer, linear)
    linear(torch.randn(3, 4, dtype=torch.complex64) + 1).abs().sum().backward()
    optimizer.step()
    assert linear.weight.grad is not None
    assert linear.weight.grad.mean(1).abs().max() < 1e-6


def test_a_mask_that_is_applied_again_after_centering_keeps_frozen_entries() -> None:
    """As in docs/optimizers.md: centering gives the entries that a hook has masked a gradient."""
    for again in (False, True):
        model = _model()
        weight = model[0].weight
        mask = torch.ones_like(weight).tril()
        weight.register_hook(lambda g, mask=mask: g * mask)
        optimizer = SGD(model.parameters(), lr=0.1)
        centralize(optimizer, model)
        if again:
            optimizer.register_step_pre_hook(
                lambda *_, weight=weight, mask=mask: setattr(weight, "grad", weight.grad * mask)
            )
        before = weight.detach().clone()
        _backward(model)
        optimizer.step()
        assert not torch.equal(weight, before)
        assert torch.equal(weight[mask == 0], before[mask == 0]) is again


# Errors.


def test_an_unknown_placement_raises() -> None:
    model = _model()
    choices = "'gradient', 'regularized', 'update'"
    with pytest.raises(ValueError, match=f"unknown placement 'weights'; choose from {choices}"):
        centralize(SGD(model.parameters()), model, "weights")


def test_model_and_layout_exclude_each_other() -> None:
    model = _model()
    optimizer = SGD(model.parameters())
    calls: list[Callable[..., Any]] = [lambda **k: centralize(optimizer, **k), centralize_gradients]
    with pytest.raises(ValueError, match="pass model=.*from_parameters.*from_shapes"):
        centralize_gradients()
    for call in calls:
        with pytest.raises(ValueError, match="model or layout, not both"):
            call(model=model, layout=weight_layout(model))
        with pytest.raises(TypeError, match="layout must be a WeightLayout"):
            call(layout={})
    handle = centralize(optimizer, layout=WeightLayout.from_shapes(model.parameters()))
    assert len(handle.layout) == 2


def test_a_model_that_is_not_in_the_optimizer_raises() -> None:
    model = _model()
    with pytest.raises(ValueError, match="none of the model's parameters is in the optimizer"):
        centralize(SGD(model.parameters()), copy.deepcopy(model))


def test_an_optimizer_without_anything_to_center_raises() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"nothing is left to center.*0.weight: lookup table.*1.weight: gain"):
        centralize(SGD(model.parameters()), model)
    with pytest.raises(ValueError, match="nothing to center: 0 of 3"):
        centralize_gradients(model)
    linear = _model()
    with pytest.raises(ValueError, match=r"nothing is left to center in this optimizer \(0.bias: bias"):
        centralize(SGD([p for p in linear.parameters() if p.ndim == 1]), linear)


def test_an_object_that_is_not_an_optimizer_raises() -> None:
    model = _model()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer with step hooks, not Sequential"):
        centralize(model, model)


def test_wrapped_optimizers_are_unwrapped() -> None:
    """accelerate's AcceleratedOptimizer is an Optimizer without step hooks that wraps an optimizer with hooks."""

    class Accelerated(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(Accelerated(optimizer), model)
    assert attached(optimizer) == [handle]
