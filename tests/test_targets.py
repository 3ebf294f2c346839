"""Changes of a model after attaching: the layout follows them, or the step reports what no longer trains."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, stateless
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import centralize, weight_layout
from gradcentral.attach import centering_of
from gradcentral.targets import PLACEMENTS

can_swap = importlib.util.find_spec("torch.optim._stateless") is not None
if can_swap:
    from torch.optim._stateless import swap_in_optimizer_params_and_state


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(params=["hook", "fused"])
def attached(request: pytest.FixtureRequest) -> tuple[Any, Optimizer]:
    """A model and an optimizer before its first step."""
    model = _model()
    if request.param == "fused":
        return model, gradcentral.SGD(model, lr=0.1)
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    return model, optimizer


def test_flat_partitions_put_into_the_optimizer_raise(attached: tuple[Any, Optimizer]) -> None:
    _, optimizer = attached
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]]))
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed's ZeRO does
    with pytest.raises(RuntimeError, match=r"no longer holds any of the parameters to center.*fully_shard \(FSDP2\)"):
        optimizer.step()


def test_parameters_whose_shape_has_changed_raise(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    model[2].weight.data = model[2].weight.data.flatten()
    with pytest.raises(RuntimeError, match=r"2.weight had shape \(3, 6\) .* has \(18,\) now"):
        optimizer.step()


def test_a_replaced_layer_raises(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    model[2] = nn.Linear(6, 5)
    with pytest.raises(
        RuntimeError, match=r"no longer uses \(2.weight, 2.bias\).* in their place \(2.weight, 2.bias\)"
    ):
        optimizer.step()


def test_a_parametrization_of_all_layers_raises(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    for layer in (model[0], model[2]):
        weight_norm(layer)
    with pytest.raises(RuntimeError, match=r"the model no longer uses.*\(0.weight, 2.weight\)"):
        optimizer.step()


@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, lambda layer: weight_norm(layer, "bias")])
def test_a_parametrization_of_one_layer_raises(attached: tuple[Any, Optimizer], change: Any) -> None:
    model, optimizer = attached
    change(model[0])
    with pytest.raises(RuntimeError, match=r"no longer uses \(0\.(weight|bias)\).* in their place \(0\.\w"):
        optimizer.step()


def test_the_removal_of_a_parametrization_raises() -> None:
    for make, remove in (
        (weight_norm, lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight")),
        (old_weight_norm, nn.utils.remove_weight_norm),
    ):
        model = _model()
        make(model[0])
        optimizer = gradcentral.SGD(model, lr=0.1)
        remove(model[0])
        with pytest.raises(RuntimeError, match=r"no longer uses \(0\..*\).* in their place \(0.weight\)"):
            optimizer.step()


def test_a_model_of_new_layers_raises() -> None:
    for names, message in ((("other",), "place .other.weight, other.bias."), ((), "place .none is trained.")):
        model = nn.ModuleDict({"layer": nn.Linear(4, 3)})
        optimizer = gradcentral.SGD(model, lr=0.1)
        del model["layer"]
        model.update({name: nn.Linear(4, 3) for name in names})
        with pytest.raises(RuntimeError, match=rf"no longer uses .layer.weight, layer.bias.* {message}"):
            optimizer.step()


def test_a_removed_layer_does_not_raise(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    del model[2]
    torch.autograd.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()


def _step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()


def test_a_layer_replaced_after_the_first_step_warns_once(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    _step(model, optimizer)
    model[2] = nn.Linear(6, 5)
    message = r"no longer uses \(2.weight, 2.bias\).* does not train them: add them"
    with pytest.warns(UserWarning, match=message) as found:
        _step(model, optimizer)
    assert [warning.filename for warning in found] == [__file__]  # rather than the wrapper of step in torch.optim
    _step(model, optimizer)
    model[2].weight.grad[:] = 1
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[2].weight, before)


def test_a_tied_head_that_is_replaced_warns_once() -> None:
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    model[1].weight = model[0].weight
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    optimizer.step()
    model[1] = nn.Linear(4, 4, bias=False)
    with pytest.warns(UserWarning, match=r"no longer uses \(1.weight\).* in their place \(1.weight\)"):
        optimizer.step()
    optimizer.step()


def test_a_layer_inserted_before_others_does_not_warn(attached: tuple[Any, Optimizer]) -> None:
    """Their names change, but they are trained as before."""
    model, optimizer = attached
    _step(model, optimizer)
    model.insert(0, nn.Linear(4, 4))
    _step(model, optimizer)


def test_adapters_added_to_a_frozen_model_warn_once(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    model.requires_grad_(False)
    model.append(nn.Linear(3, 2))
    with pytest.warns(
        UserWarning, match=r"lacks the trained parameters 3.weight, 3.bias, .*: this step trains nothing"
    ):
        _step(model, optimizer)
    _step(model, optimizer)


def test_a_step_without_gradients_does_not_warn(attached: tuple[Any, Optimizer]) -> None:
    model, optimizer = attached
    optimizer.step()
    model.requires_grad_(False)
    optimizer.step()


# Changes of the model that the layout follows.


def _layout_of(optimizer: Optimizer) -> gradcentral.WeightLayout:
    (targets,) = centering_of(optimizer)
    return targets.layout


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("kind", ["attached", "fused"])
def test_pruning_is_followed(kind: str, placement: str) -> None:
    """A pruned weight is no longer centered, since its mean would include masked entries; after prune.remove it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    optimizer, other = _optimizer(kind, model, placement), copy.deepcopy(model)
    _step_alike(model, optimizer, other, _optimizer(kind, other, placement))
    changes: list[tuple[Any, bool]] = [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), True),
        (lambda layer: prune.remove(layer, "weight"), False),
    ]
    for change, is_pruned in changes:
        change(model[0])
        change(other[0])
        _step_alike(model, optimizer, other, _optimizer(kind, other, placement))
        names = _layout_of(optimizer).skipped
        assert names.keys() == weight_layout(model).skipped.keys()
        assert ("0.weight_orig" in names) is is_pruned


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("kind", ["attached", "fused"])
def test_a_parametrization_that_keeps_the_parameter_is_followed(kind: str, placement: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = _model()
    optimizer = _optimizer(kind, model, placement)
    _step(model, optimizer)
    other = copy.deepcopy(model)
    for net in (model, other):
        nn.utils.parametrize.register_parametrization(net[0], "weight", Doubled())
    _step_alike(model, optimizer, other, _optimizer(kind, other, placement))
    assert _layout_of(optimizer).skipped["0.parametrizations.weight.original"] == "parametrized by Doubled"
    nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=True)
    _step(model, optimizer)
    assert "0.weight" in _layout_of(optimizer)


@pytest.mark.parametrize("kind", ["attached", "fused"])
def test_a_weight_tied_later_is_skipped(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cast("torch.Tensor", self.head(self.hidden(self.table.weight[:3])))

    model = Net()
    optimizer = _optimizer(kind, model, "gradient")
    model.table.weight = model.head.weight
    _step(model, optimizer)
    assert _layout_of(optimizer).skipped["table.weight"].startswith("tied: ")


def test_two_optimizers_that_share_a_layout_follow_it_both() -> None:
    model = _model()
    layout = weight_layout(model)
    optimizers = [SGD(model[position].parameters(), lr=0.1) for position in (0, 2)]
    for optimizer in optimizers:
        centralize(optimizer, layout=layout)
        _step(model, optimizer)
    for position in (0, 2):
        model[position] = nn.Linear(*reversed(model[position].weight.shape))
    for optimizer, names in zip(optimizers, ("0.weight, 0.bias", "2.weight, 2.bias"), strict=True):
        with pytest.warns(UserWarning, match=f"no longer uses .{names}."):
            _step(model, optimizer)


def _optimizer(kind: str, model: nn.Module, placement: str, momentum: float = 0.0) -> Optimizer:
    if kind == "fused":
        return gradcentral.SGD(model, lr=0.1, momentum=momentum, placement=placement)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=momentum)
    centralize(optimizer, model, placement)
    return optimizer


def _step_alike(model: nn.Module, optimizer: Optimizer, other: nn.Module, fresh: Optimizer) -> None:
    """Take one step of both models on the same batch; the results are equal and differ from the initial weights."""
    before = [p.detach().clone() for p in model.parameters()]
    for net, chosen in ((model, optimizer), (other, fresh)):
        torch.manual_seed(1)
        _step(net, chosen)
    for p, q, old in zip(model.parameters(), other.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        assert not torch.equal(p, old)


def test_centralize_gradients_follows_pruning() -> None:
    model = nn.Linear(6, 4, bias=False)
    model(torch.randn(3, 6)).square().sum().backward()
    gradcentral.centralize_gradients(model)
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(ValueError, match="nothing to center"):
        gradcentral.centralize_gradients(model)
    prune.remove(model, "weight")
    layout = weight_layout(model)
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(ValueError, match="nothing to center"):
        gradcentral.centralize_gradients(layout=layout)


def test_attaching_to_flat_partitions_raises() -> None:
    model = _model()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    with pytest.raises(ValueError, match="flat partitions, such as DeepSpeed's ZeRO, cannot be centered") as raised:
        centralize(SGD([flat], lr=0.1), model)
    remedy = re.search(r"or call (gradcentral.+) before deepspeed.initialize$", str(raised.value))
    assert remedy
    eval(remedy[1])
    model(torch.randn(5, 4)).square().sum().backward()
    assert model[0].weight.grad.mean(1).abs().max() < 1e-5


def test_attaching_to_partitioned_parameters_raises() -> None:
    model = _model()
    weight: Any = model[0].weight
    weight.ds_id, weight.ds_shape = 0, weight.shape  # as DeepSpeed's ZeRO-3 marks them
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="0.weight of shape .* made by DeepSpeed ZeRO-3") as raised:
        gradcentral.SGD(model, lr=0.1)
    remedy = re.search(r"or call (gradcentral.+) before deepspeed.initialize$", str(raised.value))
    assert remedy
    model = _model()
    eval(remedy[1])
    weight = model[0].weight
    whole, weight.data = weight.detach().clone(), torch.empty(0)  # partitioned, and gathered for each pass
    weight.ds_id, weight.ds_shape, weight.data = 0, whole.shape, whole
    model(torch.randn(5, 4)).square().sum().backward()
    assert weight.grad.abs().max() > 0
    assert weight.grad.mean(1).abs().max() < 1e-5


def test_parameters_registered_under_another_name_do_not_raise() -> None:
    for change in (_wrap, _parametrize, _tie, _replace_and_add):
        for kind in ("attached", "fused"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            optimizer: torch.optim.Optimizer
            if kind == "fused":
                optimizer = gradcentral.SGD(model, lr=0.1)
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                gradcentral.centralize(optimizer, model)
            change(model, optimizer)
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()


def _wrap(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0] = nn.Sequential(model[0])
    model[1] = nn.Sequential(model[1])


def _parametrize(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


def _tie(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1].weight = model[0].weight


def _replace_and_add(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1] = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(model[1].parameters())})


def test_a_second_step_raises_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = gradcentral.SGD(model, lr=0.1)
    model[0] = nn.Linear(4, 4)
    model(torch.randn(3, 4)).square().sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the model no longer uses"):
            optimizer.step()


def _swapped(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return new parameters for a functional step, and the context in which model and optimizer hold them."""
    params = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    contexts = ExitStack()
    contexts.enter_context(stateless._reparametrize_module(model, params))
    state = copy.deepcopy(optimizer.state_dict())
    contexts.enter_context(swap_in_optimizer_params_and_state(optimizer, params, state))
    return params, contexts


@pytest.mark.skipif(not can_swap, reason="needs a torch with torch.optim._stateless")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["hook", "fused"])
def test_the_first_step_after_a_checkpoint_may_be_functional(kind: str, placement: str) -> None:
    model = _model()
    optimizer = _optimizer(kind, model, placement, momentum=0.9)
    torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
    optimizer.step()
    checkpoint = optimizer.state_dict()
    model = _model()
    optimizer = _optimizer(kind, model, placement, momentum=0.9)
    optimizer.load_state_dict(checkpoint)
    params, contexts = _swapped(model, optimizer)
    with contexts:
        before = {name: p.detach().clone() for name, p in params.items()}
        for p in model.parameters():
            p.grad = torch.rand_like(p) + 0.5
        optimizer.step()
    _assert_means_kept(before, params)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
    optimizer.step()  # a usual step
    _assert_means_kept(before, dict(model.named_parameters()))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["hook", "fused"])
def test_an_optimizer_may_receive_the_new_parameters_of_the_model(kind: str, placement: str) -> None:
    """accelerate replaces the parameters of the model (FSDP2) and then those of the optimizer."""
    model = _model()
    optimizer = _optimizer(kind, model, placement, momentum=0.9)
    for layer in (model[0], model[2]):
        for name, p in [*layer.named_parameters()]:
            setattr(layer, name, nn.Parameter(p.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.autograd.backward(model(torch.randn(9, 4)).square().sum())
        optimizer.step()
        _assert_means_kept(before, dict(model.named_parameters()))


def _assert_means_kept(before: dict[str, Tensor], now: Mapping[str, Tensor]) -> None:
    for name, w in before.items():
        assert not torch.equal(now[name], w)
        if w.ndim == 2:
            torch.testing.assert_close(now[name].detach().mean(1), w.mean(1), rtol=0, atol=1e-6)
