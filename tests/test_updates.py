"""`centered_update` and `center_update_`: centering any change of the weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradcentral
from gradcentral import WeightLayout, WeightVectors, center, center_update_, centered_update, weight_layout
from gradcentral.projection import unit_means
from tests.strategies import Case, cases

ROWS = WeightVectors((1,))


def _model() -> Any:  # nn.Sequential: its layers have no typed `weight`
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(150, 5)]
    return nn.Sequential(*layers).double()


def _backward(model: nn.Module, step: int) -> Tensor:
    model.zero_grad()
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    loss: Tensor = (model(x) - 1).square().mean()
    torch.autograd.backward(loss)
    return loss.detach()


def _means(model: nn.Module, layout: WeightLayout | None = None) -> list[Tensor]:
    return [unit_means(p.detach(), v) for p, v in (layout or weight_layout(model)).items()]


def _drift(model: nn.Module, before: list[Tensor]) -> float:
    return max(float((now - old).abs().max()) for now, old in zip(_means(model), before, strict=True))


def _random_change(model: nn.Module) -> None:
    numbers = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=numbers, dtype=torch.float64).to(p.dtype) + 0.5)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Any]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.05, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.05, momentum=0.9),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.05),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_inside_equal_placement_update(name: str) -> None:
    model, expected = _model(), _model()
    before = _means(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    attached = OPTIMIZERS[name](expected.parameters())
    gradcentral.centralize(attached, expected, placement="update")
    for step in range(6):
        with centered_update(model):
            loss = optimizer.step(lambda step=step: _backward(model, step))
        assert loss is not None
        attached.step(lambda step=step: _backward(expected, step))
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, other)
    assert _drift(model, before) < 1e-14


def test_any_change_inside_is_centered_and_the_rest_is_left_alone() -> None:
    model, free = _model(), _model()
    layout = weight_layout(model)
    before = copy.deepcopy(model.state_dict())
    with centered_update(model):
        _random_change(model)
    _random_change(free)
    for name, old in before.items():
        got, change = model.get_parameter(name), free.get_parameter(name).detach() - old
        expected = old + (center(change, layout[name]) if name in layout else change)
        torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-13)
        assert float(change.abs().max()) > 1.0


def test_unchanged_weights_keep_their_bits() -> None:
    model = _model().float()
    before = copy.deepcopy(model.state_dict())
    with centered_update(model):
        _backward(model.double(), 0)
        model.float()
    for name, old in before.items():
        assert torch.equal(model.get_parameter(name), old)


def test_a_block_reduces_drift_to_rounding_in_half_precision() -> None:
    model = nn.Linear(64, 32).bfloat16()
    before = unit_means(model.weight.detach(), ROWS)
    with centered_update(model):
        _random_change(model)
    assert float((unit_means(model.weight.detach(), ROWS) - before).abs().max()) < 2e-3


def test_an_average_of_weights_keeps_its_means() -> None:
    model = _model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first call copies
    before = _means(average)
    for _ in range(3):
        _random_change(model)
        with centered_update(average):
            average.update_parameters(model)
    assert _drift(average, before) < 1e-14
    assert _drift(model, before[:]) > 1.0


class ScheduleFreeSGD:
    """Schedule-Free SGD (Defazio et al. 2024), written without step hooks: the weights are y, or x after eval()."""

    def __init__(self, model: nn.Module, lr: float, beta: float = 0.9) -> None:
        self.params = [*model.parameters()]
        self.z = [p.detach().clone() for p in self.params]
        self.lr, self.beta, self.steps = lr, beta, 0

    def _swap(self, weight: float) -> None:
        for p, z in zip(self.params, self.z, strict=True):
            p.data.lerp_(z, weight)

    def eval(self) -> None:
        self._swap(1 - 1 / self.beta)  # x = y + (1 − 1/β)(z − y)

    def train(self) -> None:
        self._swap(1 - self.beta)

    def step(self) -> None:
        self.steps += 1
        for p, z in zip(self.params, self.z, strict=True):
            assert p.grad is not None
            x = p.data.lerp(z, 1 - 1 / self.beta)
            z.sub_(self.lr * p.grad)
            x.lerp_(z, 1 / self.steps)
            p.data = x.lerp(z, 1 - self.beta)


def test_schedule_free_keeps_the_means_of_both_sequences() -> None:
    model, free = _model(), _model()
    before = _means(model)
    optimizer, plain = ScheduleFreeSGD(model, 0.05), ScheduleFreeSGD(free, 0.05)
    for step in range(5):
        _backward(model, step)
        with centered_update(model):
            optimizer.step()
        assert _drift(model, before) < 1e-14
        _backward(free, step)
        plain.step()
    for own, other in ((optimizer.eval, plain.eval), (optimizer.train, plain.train)):
        with centered_update(model):
            own()
        other()
        assert _drift(model, before) < 1e-14
        assert _drift(free, before) > 1e-3


def test_updates_during_the_backward_pass_are_centered() -> None:
    model, expected = _model(), _model()

    def descend(p: Tensor) -> None:
        assert p.grad is not None
        p.data.add_(p.grad, alpha=-0.1)

    for p in model.parameters():  # as LOMO does
        p.register_post_accumulate_grad_hook(descend)
    optimizer = gradcentral.SGD(expected, lr=0.1, placement="update")
    for step in range(3):
        with centered_update(model):
            _backward(model, step)
        _backward(expected, step)
        optimizer.step()
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-13)


def test_an_exception_leaves_what_happened() -> None:
    model, free = _model(), _model()

    @centered_update(model)
    def fail() -> None:
        _random_change(model)
        raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        fail()
    _random_change(free)
    for p, other in zip(model.parameters(), free.parameters(), strict=True):
        assert torch.equal(p, other)


def test_blocks_may_be_nested_and_used_as_decorators() -> None:
    model, expected = _model(), _model()
    before = _means(model)

    @centered_update(expected)
    def change() -> None:
        _random_change(expected)
        _random_change(expected)

    with centered_update(model):
        _random_change(model)
        with centered_update(model):
            drifted = _means(model)
            assert _drift(model, before) > 0.1
            _random_change(model)
        assert _drift(model, drifted) < 1e-14
    change()
    assert _drift(model, before) < 1e-14
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-13)


def test_the_layout_of_a_model_is_determined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    original = weight_layout

    def counted(model: nn.Module) -> WeightLayout:
        calls.append(model)
        return original(model)

    monkeypatch.setattr("gradcentral.gradients.weight_layout", counted)
    model = _model()
    for _ in range(3):
        with centered_update(model):
            _random_change(model)
    assert calls == [model]
    model.append(nn.Linear(5, 3).double())  # followed, by the same layout
    before = model[4].weight.detach().mean(1)
    with centered_update(model):
        _random_change(model)
    torch.testing.assert_close(model[4].weight.detach().mean(1), before, rtol=0, atol=1e-14)
    assert calls == [model]


@pytest.mark.parametrize("with_model", [True, False])
def test_a_given_layout_is_used(with_model: bool) -> None:
    model = _model()
    layout = weight_layout(model, only="conv", overrides={"0.weight": "[o i] k k"})
    linear = model[3].weight.detach().mean(1)
    before = _means(model, layout)
    with centered_update(model if with_model else None, layout):
        _random_change(model)
    for now, old in zip(_means(model, layout), before, strict=True):
        torch.testing.assert_close(now, old, rtol=0, atol=1e-14)
    assert float((model[3].weight.detach().mean(1) - linear).abs().max()) > 0.1


def test_frozen_parameters_are_not_touched() -> None:
    model, free = _model(), _model()
    model[3].weight.requires_grad_(False)
    before = unit_means(model[0].weight.detach(), WeightVectors((1, 2, 3)))
    with centered_update(model):
        _random_change(model)
    _random_change(free)
    assert torch.equal(model[3].weight, free[3].weight)
    after = unit_means(model[0].weight.detach(), WeightVectors((1, 2, 3)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-14)


def test_a_model_without_trained_parameters_is_refused_and_both_remedies_work() -> None:
    model = _model().requires_grad_(False)
    with pytest.raises(ValueError, match="frozen") as raised, centered_update(model):
        pass
    remedies = r"(gradcentral\.center_update_\(.*?, layout\)|model\.requires_grad_\(\))"
    call, unfreeze = re.findall(remedies, str(raised.value))
    old, before = copy.deepcopy(model.state_dict()), _means(model)
    names = {"gradcentral": gradcentral, "model": model, "old": old, "layout": weight_layout(model)}
    _random_change(model)
    exec(call, names)
    assert _drift(model, before) < 1e-14
    exec(unfreeze, names)
    with centered_update(model):
        _random_change(model)
    assert _drift(model, before) < 1e-14


def test_a_weight_vector_that_is_not_finite_is_not_shifted() -> None:
    model = nn.Linear(3, 3).double()
    model.weight.data[0] = torch.tensor([float("-inf"), 1.0, 2.0])
    before = model.weight.detach().clone()
    with centered_update(model), torch.no_grad():
        model.weight.add_(1.0)
        model.weight[1] = torch.tensor([float("inf"), 1.0, 2.0])
    assert torch.equal(model.weight[0], before[0] + 1.0)
    assert torch.equal(model.weight[1], torch.tensor([float("inf"), 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(model.weight[2].detach(), before[2], rtol=0, atol=1e-15)


class Tied(nn.Module):
    """A language model's input embedding and output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.body = nn.Linear(4, 4)
        self.second_head = nn.Linear(4, 6, bias=False)
        self.second_head.weight = self.lm_head.weight


def test_tied_weights_are_shifted_once() -> None:
    model = Tied()
    old = copy.deepcopy(model.state_dict())
    with centered_update(model):
        _random_change(model)
    torch.testing.assert_close(model.lm_head.weight.detach().mean(1), old["lm_head.weight"].mean(1))
    state = model.state_dict()
    _random_change(model)
    expected = old["lm_head.weight"] + center(model.lm_head.weight.detach() - old["lm_head.weight"], ROWS)
    assert center_update_(state, old, weight_layout(model)) is state
    torch.testing.assert_close(model.lm_head.weight.detach(), expected)
    untied = {name: tensor + 1.0 for name, tensor in old.items()}
    center_update_(untied, old, weight_layout(model))
    torch.testing.assert_close(untied["lm_head.weight"], old["lm_head.weight"])
    torch.testing.assert_close(untied["second_head.weight"], old["lm_head.weight"])


def test_pruned_and_parametrized_models() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)).double()
    with centered_update(model):
        _random_change(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    layout = weight_layout(model)
    assert [layout.names[p] for p in layout] == ["1.parametrizations.weight.original1", "2.weight"]
    before, pruned = _means(model), model[0].weight_orig.detach().clone()
    state = copy.deepcopy(model.state_dict())
    with centered_update(model):
        _random_change(model)
    assert _drift(model, before) < 1e-14
    assert float((model[0].weight_orig.detach() - pruned).mean(1).abs().max()) > 0.1
    _random_change(model)
    center_update_(model.state_dict(), state, layout)
    assert _drift(model, before) < 1e-14


def test_layers_may_be_pruned_and_added_inside() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    before = unit_means(model[1].weight.detach(), ROWS)
    with centered_update(model):
        _random_change(model)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        model.append(nn.Linear(3, 2).double())
    after = unit_means(model[1].weight.detach(), ROWS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-14)


def _assign(model: Any) -> None:
    model.load_state_dict({name: tensor + 1.0 for name, tensor in model.state_dict().items()}, assign=True)


def _new_layer(model: Any) -> None:
    model[0] = nn.Conv2d(3, 4, 3).double()


def _remove_layer(model: Any) -> None:
    del model[0]


def _prune_rows(model: Any) -> None:
    model[0].weight.data = model[0].weight.data[:2]


SHAPES = r"0\.weight changed inside centered_update from shape \(4, 3, 3, 3\), .* to shape \(2, 3, 3, 3\)"
TYPES = r"0\.weight changed .* from .* torch\.float64 on cpu to .* torch\.float32.*: convert the model"


def _from_shapes(model: nn.Module) -> WeightLayout:
    return WeightLayout.from_shapes(model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_assign, r"0\.weight was replaced or removed inside centered_update.*without assign=True"),
        (_new_layer, r"0\.weight was replaced or removed"),
        (_remove_layer, r"0\.weight was replaced or removed"),
        (_prune_rows, SHAPES),
        (nn.Module.float, TYPES),
    ],
)
@pytest.mark.parametrize("given_layout", [None, weight_layout, _from_shapes])
def test_replaced_parameters_are_refused_before_any_mean_is_restored(
    change: Callable[[Any], object], message: str, given_layout: Callable[[nn.Module], WeightLayout] | None
) -> None:
    model, free = _model(), _model()
    linear = model[3].weight

    @centered_update(model, None if given_layout is None else given_layout(model))
    def replace() -> None:
        _random_change(model)
        change(model)

    with pytest.raises(RuntimeError, match=message):
        replace()
    _random_change(free)
    torch.testing.assert_close(linear.detach().double(), free[3].weight.detach(), rtol=0, atol=1e-6)


def test_the_remedy_for_replaced_parameters_works() -> None:
    model = _model()
    state = {name: tensor + torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    before = _means(model)
    with pytest.raises(RuntimeError, match="replaced") as raised, centered_update(model):
        _assign(model)
    load = re.findall(r"model\.load_state_dict\(state\)", str(raised.value))[0]
    (call,) = re.findall(r"gradcentral\.center_update_\(new, old, layout\)", str(raised.value))
    model = _model()
    names = {"gradcentral": gradcentral, "model": model, "state": state, "layout": weight_layout(model)}
    old = copy.deepcopy(model.state_dict())
    with centered_update(model):
        exec(load, names)
    assert _drift(model, before) < 1e-14
    exec(call, {**names, "new": state, "old": old})
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, model.get_parameter(name).detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("pattern", ["(2 [o]) [i] k k", "o [i k k]"])
def test_assigned_data_may_have_other_strides(pattern: str) -> None:
    model = nn.Conv2d(3, 4, 3).double()
    layout = weight_layout(model, overrides={"weight": pattern})
    vectors = layout["weight"]
    expected = model.weight.detach() + center(torch.arange(108, dtype=torch.float64).view(4, 3, 3, 3), vectors)
    with centered_update(model, layout):
        changed = model.weight.data + torch.arange(108, dtype=torch.float64).view(4, 3, 3, 3)
        model.weight.data = changed.contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-12)


def test_nothing_to_center_is_refused() -> None:
    for arguments, message in (
        ((), "pass model="),
        ((nn.LayerNorm(4),), "nothing to center"),
        ((nn.LazyLinear(3),), "run one forward pass"),
        ((nn.Linear(3, 2), weight_layout(nn.Linear(3, 2))), "weight is not a parameter of the model"),
    ):
        with pytest.raises(ValueError, match=message), centered_update(*arguments):
            pass
    with pytest.raises(TypeError, match="layout must be a WeightLayout"), centered_update(layout="o [i]"):  # type: ignore[arg-type]
        pass


def test_lazy_parameters_are_centered_once_they_have_values() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).double()
    layout = weight_layout(model)
    model(torch.randn(2, 5, dtype=torch.float64))
    before = _means(model)
    with centered_update(layout=layout):
        _random_change(model)
    assert _drift(model, before) < 1e-14


@given(case=cases(expanded=False), seed=st.integers(0, 1000))
def test_center_update_of_two_tensors_is_old_plus_the_centered_change(case: Case, seed: int) -> None:
    new, vectors = case
    numbers = torch.Generator().manual_seed(seed)
    old = torch.randn(new.shape, generator=numbers, dtype=torch.float64).to(new.dtype)
    expected = old.double() + center(new.double() - old.double(), vectors)
    raw, kept = new.clone(), old.clone()
    assert center_update_(new, old, vectors) is new
    tolerance = 8 * torch.finfo(new.dtype).eps * max(1.0, float(torch.cat([raw.flatten(), old.flatten()]).abs().max()))
    torch.testing.assert_close(new.double(), expected, rtol=0, atol=tolerance)
    assert torch.equal(old, kept)


@given(case=cases(expanded=False), seed=st.integers(0, 1000), strength=st.floats(0, 1) | st.sampled_from([0.0, 1.0]))
def test_of_a_change_a_part_of_the_mean_remains(case: Case, seed: int, strength: float) -> None:
    """A block around a change, and the two states before and after it, in any layout, dtype and memory format."""
    old = case.tensor
    numbers = torch.Generator().manual_seed(seed)
    change = (torch.randn(old.shape, generator=numbers, dtype=torch.float64) + 0.5).to(old.dtype)
    new = old + change
    expected = old.double() + center((new.double() - old.double()), case.vectors, strength)
    model = nn.Module()
    model.weight = nn.Parameter(old.clone())
    if case.vectors.for_shape(old.shape).fan_in > 1:
        layout = weight_layout(model, overrides={"weight": case.vectors})
        with centered_update(model, layout, strength), torch.no_grad():
            model.weight.copy_(new)
        _assert_close(model.weight.detach(), expected)
        state = {"weight": new.clone()}
        center_update_(state, {"weight": old}, layout, strength=strength)
        _assert_close(state["weight"], expected)
    _assert_close(center_update_(new, old, case.vectors, strength), expected)


def _assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 8 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), torch.tensor(2.0), torch.ones(2)], ids=str)
def test_a_strength_outside_0_to_1_raises_before_any_change(bad: Any) -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="strength must be "), centered_update(model, strength=bad):
        _random_change(model)
    new = {"weight": before + 1}
    with pytest.raises(ValueError, match="strength must be "):
        center_update_(new, {"weight": before}, weight_layout(model), strength=bad)
    assert torch.equal(model.weight, before)
    assert torch.equal(new["weight"], before + 1)


def test_a_strength_may_be_a_tensor() -> None:
    model = nn.Linear(4, 3).double()
    before = model.weight.detach().clone()
    with centered_update(model, strength=torch.tensor(0.25)), torch.no_grad():
        model.weight += torch.arange(4.0)
    torch.testing.assert_close(model.weight.detach(), before + torch.arange(4.0).double() - 0.25 * 1.5)


def test_center_update_merges_two_checkpoints() -> None:
    base, first, second = _model(), _model(), _model()
    _random_change(first)
    for p in second.parameters():
        p.data.mul_(3.0)
    old, layout = base.state_dict(), weight_layout(base)
    tuned = [first.state_dict(), second.state_dict()]
    merged = {name: (tuned[0][name] + tuned[1][name]).float() / 2 for name in old}
    merged["step"] = torch.tensor(3)
    raw = copy.deepcopy(merged)
    center_update_(merged, old, layout)
    for name in old:
        change = raw[name].double() - old[name]
        expected = old[name] + (center(change, layout[name]) if name in layout else change)
        assert merged[name].dtype == torch.float32
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(merged["step"], raw["step"])


def test_center_update_of_a_part_of_a_state() -> None:
    model = _model()
    old, layout = copy.deepcopy(model.state_dict()), weight_layout(model)
    part = {"3.weight": old["3.weight"] + 1.0, "0.weight": old["0.weight"]}  # the second one is shared: no change
    center_update_(part, old, layout)
    torch.testing.assert_close(part["3.weight"], old["3.weight"], rtol=0, atol=1e-14)


def test_center_update_refuses_what_does_not_fit_before_any_change() -> None:
    model = _model()
    old, layout = copy.deepcopy(model.state_dict()), weight_layout(model)
    new = {name: tensor + 1.0 for name, tensor in old.items()}
    wrong: list[tuple[Any, Any, Any, str]] = [
        (new, {}, layout, r"0\.weight is in new, but not in old"),
        (
            {f"module.{name}": tensor for name, tensor in new.items()},
            old,
            layout,
            r"none .*\(0\.weight, …\), but module\.",
        ),
        (
            {**new, "3.weight": new["3.weight"][:2]},
            old,
            layout,
            r"3\.weight has shape \(2, 150\) in new, but \(5, 150\)",
        ),
        ({**new, "3.weight": new["3.weight"].T}, {**old, "3.weight": old["3.weight"].T}, layout, r"\(5, 150\) in the"),
        ({**new, "3.weight": new["3.weight"].int()}, old, layout, r"3\.weight in new cannot be centered: dtype int32"),
        (new, {**old, "3.weight": old["3.weight"].to_sparse()}, layout, r"3\.weight in old cannot be .* sparse"),
        (new, {**old, "3.weight": old["3.weight"].to(torch.complex128)}, layout, r"3\.weight is complex in old"),
        ({**new, "3.weight": new["3.weight"][:1].expand(5, 150)}, old, layout, r"3\.weight: several elements"),
        ({**new, "3.weight": 1.0}, old, layout, r"3\.weight in new must be a tensor, not float"),
        (new, old, "o [i]", r"for state dicts, pass the layout"),
        (new["3.weight"], old["3.weight"], layout, r"for tensors, pass a pattern"),
        (new["3.weight"], old, layout, r"two state dicts or two tensors, not Tensor and OrderedDict"),
        (new["3.weight"], old["3.weight"], "o [i k]", r"3 axes, but the shape has 2|'o \[i k\]'"),
    ]
    for given_new, given_old, given_layout, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            center_update_(given_new, given_old, given_layout)
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name] + 1.0)


def test_center_update_refuses_states_that_share_memory_and_the_remedy_works() -> None:
    model = _model()
    layout, before = weight_layout(model), _means(model)
    old = model.state_dict()
    _random_change(model)
    with pytest.raises(ValueError, match="share their memory") as raised:
        center_update_(model.state_dict(), old, layout)
    (remedy,) = re.findall(r"old = copy\.deepcopy\(model\.state_dict\(\)\)", str(raised.value))
    model = _model()
    names: dict[str, Any] = {"copy": copy, "model": model}
    exec(remedy, names)
    _random_change(model)
    center_update_(model.state_dict(), names["old"], layout)
    assert _drift(model, before) < 1e-14
