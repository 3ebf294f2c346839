"""`centralize_in_backward`: each gradient is centered when backward() computes it."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing  # registers tensors with the pickler of multiprocessing
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gradcentral
from gradcentral import WeightLayout, attached, center, centralize, centralize_in_backward, weight_layout


class Net(nn.Module):
    """Rows, columns, groups, and parameters that are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.linear(self.norm(self.conv(x).mean((2, 3)))).tanh())
        return output


def _net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def _mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _images(seed: int = 0) -> Tensor:
    return torch.randn(5, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _backward(model: nn.Module, x: Tensor) -> None:
    torch.autograd.backward((model(x) - 1).square().mean())


def _backward_twice(model: nn.Module) -> None:
    for _ in range(2):
        _backward(model, _x())


def _by_hand(make: Callable[[], nn.Module], *batches: Tensor) -> dict[str, Tensor]:
    """Return Φ of the gradients of an equal model without hooks."""
    model = make()
    for x in batches:
        _backward(model, x)
    layout = weight_layout(model)
    return {
        name: center(p.grad, layout[p]) if p in layout else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("_no_warnings")
def test_accumulated_gradients_are_centered() -> None:
    model = _net()
    handle = centralize_in_backward(model)
    assert len(handle.layout) == 3
    batches = [_images(0), _images(1)]
    for x in batches:
        _backward(model, x)
    _assert_gradients(model, _by_hand(_net, *batches))


def test_gradients_of_autograd_grad_are_centered_too() -> None:
    model = _mlp()
    centralize_in_backward(model)
    loss = (model(_x()) - 1).square().mean()
    found: Any = torch.autograd.grad(loss, [*model.parameters(), torch.zeros(1, requires_grad=True)], allow_unused=True)
    assert found[-1] is None
    for gradient, expected in zip(found, _by_hand(_mlp, _x()).values(), strict=False):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    unused: Any = nn.ModuleList([_mlp(), nn.Linear(3, 2)])
    centralize_in_backward(unused)
    found = torch.autograd.grad(unused[0](_x()).sum(), unused[1].weight, allow_unused=True)
    assert found == (None,)


def test_the_second_derivative_contains_the_projection() -> None:
    def penalty(model: Any, by_hand: bool) -> Tensor:
        weight = model[0].weight
        (gradient,) = torch.autograd.grad(model(_x()).square().sum(), weight, create_graph=True)
        if by_hand:
            gradient = center(gradient, "o [i]")
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), weight)
        return center(second, "o [i]") if by_hand else second

    model = _mlp()
    centralize_in_backward(model)
    torch.testing.assert_close(penalty(model, False), penalty(_mlp(), True), rtol=0, atol=1e-12)


def test_a_gradient_that_autograd_uses_twice_is_not_changed() -> None:
    a, b = (nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(2))
    centralize_in_backward(layout=WeightLayout.from_shapes([a]))
    gradient = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).square()
    before = gradient.clone()
    (a + b).backward(gradient)
    assert torch.equal(gradient, before)
    assert torch.equal(b.grad, before)  # type: ignore[arg-type]
    torch.testing.assert_close(a.grad, center(before, "o [i]"))


def test_expanded_gradients_are_centered() -> None:
    weight: Any = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    centralize_in_backward(layout=WeightLayout.from_shapes([weight]))
    along = torch.tensor([1.0, 2.0, 6.0, 11.0], dtype=torch.float64)
    (weight.sum(0) * along).sum().backward()  # each row of the gradient is the same memory
    torch.testing.assert_close(weight.grad, (along - 5).expand(3, 4))
    weight.grad.add_(torch.eye(3, 4))  # each element has memory of its own
    assert weight.grad[0, 0] == -3
    weight.grad = None
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4, dtype=torch.float64))


def test_a_sparse_gradient_raises_with_its_name_and_the_remedy_works() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    handle = centralize_in_backward(layout=weight_layout(model, overrides={"0.weight": "o [i]"}))
    with pytest.raises(ValueError, match="0.weight has a sparse gradient") as raised:
        model(torch.tensor([1, 2])).sum().backward()
    remedy = re.search(r"skip it with (layout=weight_layout\(.+?\]\))", str(raised.value))
    assert remedy
    handle.remove()
    eval(f"centralize_in_backward({remedy[1]})")
    model(torch.tensor([1, 2])).square().sum().backward()
    assert model[1].weight.grad.mean(1).abs().max() < 1e-6  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])
def test_other_types(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(3, 8).to(dtype))
    centralize_in_backward(layout=WeightLayout.from_shapes([weight]))
    gradient = torch.randn(3, 8).to(dtype) + 3
    weight.backward(gradient)
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert torch.equal(weight.grad, center(gradient, "o [i]"))


def test_a_model_that_is_converted_afterwards() -> None:
    model = _mlp().float()
    centralize_in_backward(model)
    _backward(model.double(), _x())
    model.zero_grad()
    _backward(model.bfloat16(), _x().bfloat16())
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert model[0].weight.grad.float().mean(1).abs().max() < 1e-2 * model[0].weight.grad.float().abs().max()


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("calls_forward", [True, False])
def test_lazy_parameters(calls_forward: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyLinear(3))
    handle = centralize_in_backward(model)
    assert "active" in repr(handle)
    assert centralize_in_backward(model) is handle
    run = model if calls_forward else model.forward
    for _ in range(2):
        run(torch.randn(5, 4)).square().sum().backward()
    assert len(handle.layout) == 2
    assert all(p.grad.abs().max() > 0 and p.grad.mean(1).abs().max() < 1e-5 for p in handle.layout)  # type: ignore[union-attr]


def test_parameters_that_are_frozen_or_unfrozen_later() -> None:
    model = _net()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    centralize_in_backward(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    model.requires_grad_(True)
    (model.forward(_images()) - 1).square().mean().backward()  # without the hook on the model
    _assert_gradients(model, _by_hand(_net, _images()))
    model.zero_grad()
    model.linear.requires_grad_(False)
    model.requires_grad_(True)
    _backward(model, _images())
    _assert_gradients(model, _by_hand(_net, _images()))


def test_layers_that_are_added_removed_pruned_or_parametrized_later() -> None:
    model = _mlp()
    handle = centralize_in_backward(model)
    removed = model[2]
    model[2] = nn.Linear(6, 2).double()
    weight_norm(model[0])
    model.append(nn.Linear(2, 7).double())
    _backward(model, _x())
    centered = {handle.layout.names[p] for p in handle.layout}
    assert centered == {"0.parametrizations.weight.original1", "2.weight", "3.weight"}
    for p in handle.layout:
        assert p.grad is not None
        assert p.grad.mean(1).abs().max() < 1e-15
    assert not removed.weight._backward_hooks
    prune.l1_unstructured(model[2], "weight", 0.5)
    model.zero_grad()
    _backward(model, _x())
    assert model[2].weight_orig.grad.mean(1).abs().max() > 1e-6
    assert model[3].weight.grad.mean(1).abs().max() < 1e-15


def test_calling_it_again_follows_a_model_whose_forward_is_not_called() -> None:
    model = _mlp()
    handle = centralize_in_backward(model)
    model.append(nn.Linear(3, 7).double())
    assert centralize_in_backward(model) is handle
    model.forward(_x()).square().sum().backward()
    assert model[3].weight.grad.mean(1).abs().max() < 1e-14


def test_a_model_that_has_nothing_left_to_center_warns_and_the_remedy_works() -> None:
    model = _mlp()
    centralize_in_backward(model)
    for position in (0, 2):
        prune.l1_unstructured(model[position], "weight", 0.5)
    with pytest.warns(UserWarning, match="nothing is left to center in backward") as caught:
        _backward(model, _x())
    for position in (0, 2):
        prune.remove(model[position], "weight")
    remedy = re.search(r"call (gradcentral.+?\)) after", str(caught[0].message))
    assert remedy
    eval(remedy[1])
    model.zero_grad()
    _backward(model, _x())
    assert model[2].weight.grad.mean(1).abs().max() < 1e-15


def test_tied_weights() -> None:
    def make() -> nn.Module:
        model = _mlp()
        model.append(nn.Linear(3, 6, bias=False).double())
        model.append(nn.Linear(6, 3, bias=False).double())
        model[4].weight = model[2].weight
        return model  # type: ignore[no-any-return]

    model = make()
    centralize_in_backward(model)
    _backward(model, _x())
    _assert_gradients(model, _by_hand(make, _x()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend: str) -> None:
    torch.compiler.reset()
    model = _mlp()
    handle = centralize_in_backward(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    _backward(compiled, _x())
    _assert_gradients(model, _by_hand(_mlp, _x()))
    with handle.paused():
        model.zero_grad()
        _backward(compiled, _x())
        assert model[2].weight.grad.mean(1).abs().max() > 1e-6

    def step() -> None:
        model.zero_grad()
        _backward(model, _x())

    torch.compile(step, backend=backend)()
    _assert_gradients(model, _by_hand(_mlp, _x()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = _mlp()
    centralize_in_backward(model)
    x = _x().requires_grad_()
    hidden = checkpoint(model[:2], x, use_reentrant=reentrant)
    (checkpoint(model[2], hidden, use_reentrant=reentrant) - 1).square().mean().backward()
    _assert_gradients(model, _by_hand(_mlp, _x()))


def test_an_optimizer_that_steps_in_backward() -> None:
    model, reference = _net(), _net()
    centralize_in_backward(model)
    optimizers = {p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    optimizer = SGD(reference.parameters(), lr=0.1, momentum=0.9)
    centralize(optimizer, reference)
    for seed in range(3):
        _backward(model, _images(seed))
        optimizer.zero_grad()
        _backward(reference, _images(seed))
        optimizer.step()
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_together_with_centralize_the_step_is_the_same(placement: str) -> None:
    model, reference = _net(), _net()
    centralize_in_backward(model)
    for each in (model, reference):
        optimizer = SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        centralize(optimizer, each, placement)
        for seed in range(3):
            optimizer.zero_grad()
            _backward(each, _images(seed))
            optimizer.step()
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-14)


def test_a_mask_that_is_registered_afterwards_is_applied_afterwards() -> None:
    model = _mlp()
    centralize_in_backward(model)
    mask = torch.ones_like(model[0].weight).tril()
    model[0].weight.register_hook(lambda gradient: gradient * mask)
    _backward(model, _x())
    torch.testing.assert_close(model[0].weight.grad, _by_hand(_mlp, _x())["0.weight"] * mask, rtol=0, atol=1e-15)


def test_the_handle_pauses_and_removes() -> None:
    model = _mlp()
    weight, x = model[2].weight, _x()
    handle = centralize_in_backward(model)
    assert repr(handle).startswith("<gradcentral handle, active: placement 'gradient', 2 of 4 parameters")
    assert handle.placement == "gradient"
    assert attached(model) == [handle]

    def is_centered() -> bool:
        model.zero_grad()
        _backward(model, x)
        return bool(weight.grad.mean(1).abs().max() < 1e-15)

    assert is_centered()
    handle.pause()
    with handle.paused():
        assert not is_centered()
    assert not is_centered()
    assert "paused" in repr(handle)
    handle.resume()
    with handle.paused():
        assert not is_centered()
    assert is_centered()
    handle.remove()
    handle.remove()
    assert "removed" in repr(handle)
    assert not is_centered()
    assert attached(model) == []
    assert not any(p._backward_hooks for p in model.parameters())
    assert not model._forward_hooks
    centralize_in_backward(model)
    assert is_centered()


def test_attaching_twice() -> None:
    model = _net()
    handle = centralize_in_backward(model)
    assert centralize_in_backward(model) is handle
    assert centralize_in_backward(layout=weight_layout(model)) is handle
    with pytest.raises(ValueError, match=r"already centered in backward \(3 parameters; requested: 1\)") as raised:
        centralize_in_backward(layout=weight_layout(model, only="conv"))
    exec(str(raised.value).split("first: ")[1])
    first = centralize_in_backward(layout=weight_layout(model, only="conv"))
    second = centralize_in_backward(layout=weight_layout(model, exclude=["conv.*"]))
    assert first is not second
    _backward(model, _images())
    _assert_gradients(model, _by_hand(_net, _images()))
    with pytest.raises(ValueError, match="requested: 2") as raised:
        centralize_in_backward(
            layout=weight_layout(model, exclude=["conv.*", "head.bias"], overrides={"linear.weight": "[o] i"})
        )
    exec(str(raised.value).split("first: ")[1])
    assert attached(model) == [first]


@pytest.mark.usefixtures("_no_warnings")
def test_nothing_to_center_raises() -> None:
    with pytest.raises(ValueError, match="nothing to center: 0 of 2 parameters"):
        centralize_in_backward(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="pass model="):
        centralize_in_backward()


def test_per_sample_gradients_raise() -> None:
    model = _mlp()
    handle = centralize_in_backward(model)
    model[2].weight.grad_sample = torch.zeros(1)
    with pytest.raises(ValueError, match=r"2.weight has per-sample gradients .* gradcentral.centralize\(optimizer"):
        _backward(model, _x())
    handle.remove()
    with pytest.raises(ValueError, match="2.weight has per-sample gradients"):
        centralize_in_backward(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_warns_once_when_it_is_trained_and_the_remedy_works(duplicate: Callable[[Any], Any]) -> None:
    model = _mlp()
    centralize_in_backward(model)
    twin = duplicate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            twin(_x())
        twin.eval()(_x())
        duplicate(model).requires_grad_(False)(_x())
        attended = duplicate(model)
        centralize_in_backward(attended)
        _backward(attended, _x())
    _assert_gradients(attended, _by_hand(_mlp, _x()))
    twin.train()
    with pytest.warns(UserWarning, match="this model is a copy") as caught:
        _backward_twice(twin)
    assert len(caught) == 1
    remedy = re.search(r"call (gradcentral.+?\)) for it", str(caught[0].message))
    assert remedy
    model, original = twin, model
    model.zero_grad()
    eval(remedy[1])
    for each in (model, original):
        _backward(each, _x())
        _assert_gradients(each, _by_hand(_mlp, _x()))


@pytest.mark.usefixtures("_no_warnings")
def test_a_model_can_be_sent_to_another_process() -> None:
    model = _mlp()
    handle = centralize_in_backward(model)
    ForkingPickler.dumps(model)
    assert "not attached" in repr(pickle.loads(pickle.dumps(handle)))


def test_functional_training_warns_once_and_the_remedy_works() -> None:
    model = _mlp()
    centralize_in_backward(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients_of = torch.func.grad(lambda p: torch.func.functional_call(model, p, _x()).square().sum())
    with pytest.warns(UserWarning, match=r"nothing has been centered in backward") as caught:
        gradient, _ = [gradients_of(parameters)["2.weight"] for _ in range(2)]
    assert len(caught) == 1
    remedy = re.search(r"with (gradcentral\.center.+)$", str(caught[0].message))
    assert remedy
    expected = center(gradient, "o [i]")
    assert gradient.mean(1).abs().max() > 1e-6
    assert torch.equal(eval(remedy[1], {"name": "2.weight", **globals(), **locals()}), expected)
    _backward(model, _x())  # the parameters of the model itself are still centered
    _assert_gradients(model, _by_hand(_mlp, _x()))


@pytest.mark.usefixtures("_no_warnings")
def test_functional_calls_beside_usual_training_do_not_warn() -> None:
    model = _mlp()
    centralize_in_backward(model)
    own = dict(model.named_parameters())
    torch.func.functional_call(model, own, _x()).square().sum().backward()
    assert model[2].weight.grad.mean(1).abs().max() < 1e-14
    ahead = {name: p - 0.1 for name, p in own.items()}
    torch.func.functional_call(model, ahead, _x()).square().sum().backward()
    assert model[2].weight.grad.mean(1).abs().max() < 1e-14
    assert [*attached(model)[0].layout] == [model[0].weight, model[2].weight]


def test_gradients_from_elsewhere_warn_once() -> None:
    model, copied = _mlp(), _mlp()
    _backward(model, _x())
    model[0].weight.grad = None
    centralize_in_backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(_x())
    _backward(copied, _x())
    for p, other in zip(model.parameters(), copied.parameters(), strict=True):
        p.grad = other.grad
    with pytest.warns(UserWarning, match="0.weight has a gradient that no backward pass through this model") as caught:
        [model(_x()) for _ in range(2)]
    assert len(caught) == 1


def test_attaching_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gradcentral")
    model = _net()
    one, other = SGD(model.head.parameters(), lr=0.1), torch.optim.Adam(model.linear.parameters())
    for _ in range(2):
        centralize([one, other], model, "update")
        centralize_in_backward(model)
    gradcentral.AdamW(model, placement="update")
    assert caplog.messages == [
        "Gradient Centralization attached to SGD, Adam: 2 parameters, placement 'update'",
        "Gradient Centralization attached to backward(): 3 parameters, placement 'gradient'",
        "Gradient Centralization attached to gradcentral.AdamW: 3 parameters, placement 'update'",
    ]


def test_a_probe_in_a_paused_block_measures_the_gradients_that_autograd_computes() -> None:
    data = [(_x(), torch.zeros(5, 3, dtype=torch.float64))]
    model = _mlp()
    handle = centralize_in_backward(model)
    with handle.paused():
        paused = gradcentral.probe(model, nn.functional.mse_loss, data)
    expected = gradcentral.probe(_mlp(), nn.functional.mse_loss, data)
    assert str(paused) == str(expected)
    assert str(gradcentral.probe(model, nn.functional.mse_loss, data)) != str(expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "convert",
    [torch.jit.script, lambda model: torch.jit.trace(model, _x()), lambda model: torch.compile(model, backend="eager")],
    ids=["scripted", "traced", "compiled"],
)
def test_converted_models(convert: Callable[[Any], Any]) -> None:
    model = convert(_mlp())
    handle = centralize_in_backward(model)
    assert centralize_in_backward(model) is handle
    _backward(model, _x())
    expected = _by_hand(_mlp, _x())
    _assert_gradients(model, {name: expected[name.removeprefix("_orig_mod.")] for name, _ in model.named_parameters()})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_model_can_be_scripted_after_removing_the_hooks() -> None:
    model = _mlp()
    handle = centralize_in_backward(model)
    with pytest.raises(AttributeError, match="_AfterForward"):
        torch.jit.script(model)
    handle.remove()
    assert torch.equal(torch.jit.script(model)(_x()), model(_x()))


def test_a_model_with_hooks_is_freed() -> None:
    model = _mlp()
    centralize_in_backward(model)
    _backward(model, _x())
    parameter, module = weakref.ref(model[0].weight), weakref.ref(model)
    del model
    gc.collect()
    assert parameter() is None
    assert module() is None


def test_a_strength_below_1_subtracts_a_part_of_the_mean_and_can_be_changed() -> None:
    model, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(model.state_dict())
    handle = centralize_in_backward(model, strength=0.5)
    x = torch.randn(5, 4, dtype=torch.float64)
    for strength in (0.5, 0.25, 1.0):
        handle.strength = strength
        for net in (model, plain):
            net.zero_grad()
            net(x).square().sum().backward()
        assert model.weight.grad is not None
        assert plain.weight.grad is not None
        expected = plain.weight.grad - strength * plain.weight.grad.mean(1, keepdim=True)
        torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="strength"):
        centralize_in_backward(nn.Linear(4, 3), strength=1.5)
