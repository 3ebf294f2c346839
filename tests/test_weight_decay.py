"""Placement "regularized": which optimizers' weight decay is L2, and the gradients that they receive."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral import center, centralize
from gradcentral.weight_decay import l2_of

L2_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "Adagrad": {},
    "Adadelta": {"lr": 1.0},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
}
DECOUPLED: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Adafactor": ("Adafactor", {}),
    "Muon": ("Muon", {}),
    "decoupled Adam": ("Adam", {"decoupled_weight_decay": True}),
    "no decay": ("Adam", {"weight_decay": 0.0}),
}
DECAY = 0.3


def _model() -> Any:
    return nn.Linear(5, 3, bias=False, dtype=torch.float64)


def _gradient(model: Any, step: int) -> Tensor:
    numbers = torch.Generator().manual_seed(step)
    return torch.randn(model.weight.shape, generator=numbers, dtype=torch.float64) + 0.5


def _take(optimizer: Optimizer, model: Any, gradient: Tensor) -> None:
    model.weight.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", L2_OPTIMIZERS)
def test_every_l2_optimizer_of_torch_uses_the_centered_sum(kind: str, maximize: bool) -> None:
    """The steps equal those of the same optimizer without weight decay that receives P(g + λw)."""
    options = {"lr": 0.05, "maximize": maximize} | L2_OPTIMIZERS[kind]
    model = _model()
    twin = copy.deepcopy(model)
    optimizer = getattr(torch.optim, kind)(model.parameters(), weight_decay=DECAY, **options)
    plain = getattr(torch.optim, kind)(twin.parameters(), weight_decay=0, **options)
    centralize(optimizer, model, "regularized")
    for step in range(5):
        g = _gradient(model, step)
        _take(optimizer, model, g)
        _take(plain, twin, center(g + (-DECAY if maximize else DECAY) * twin.weight.detach(), "o [i]"))
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DECOUPLED)
def test_without_l2_it_equals_placement_gradient(kind: str) -> None:
    name, options = DECOUPLED[kind]
    if not hasattr(torch.optim, name):
        pytest.skip(f"needs a version of torch with {name}")
    models = [_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, placement in zip(models, ("regularized", "gradient"), strict=True):
        optimizer = getattr(torch.optim, name)(model.parameters(), **{"lr": 0.05, "weight_decay": DECAY} | options)
        centralize(optimizer, model, placement)
        for step in range(3):
            _take(optimizer, model, _gradient(model, step))
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_it_equals_placement_update_for_sgd(nesterov: bool, fused: bool) -> None:
    weights = []
    start = _model()
    for placement in ("regularized", "update"):
        model = copy.deepcopy(start)
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": DECAY}
        if fused:
            optimizer: Optimizer = gradcentral.SGD(model, **options, placement=placement)
        else:
            optimizer = torch.optim.SGD(model.parameters(), **options)
            centralize(optimizer, model, placement)
        for step in range(5):
            _take(optimizer, model, _gradient(model, step))
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(weights[0].mean(1), start.weight.detach().mean(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("route", ["attached", "fused", "torch's step"])
def test_a_scaled_gradient_is_centered_with_scaled_weights(route: str) -> None:
    """Fused optimizers receive scaled gradients and divide by the scale themselves, as GradScaler tells them to."""
    model, scale = _model(), torch.tensor(8.0)
    twin = copy.deepcopy(model)
    if route == "attached":
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=DECAY, fused=True)
        centralize(optimizer, model, "regularized")
    else:
        optimizer = gradcentral.Adam(model, lr=0.05, weight_decay=DECAY, placement="regularized", fused=True)
        if route == "torch's step":
            optimizer = gradcentral.SGD(model, lr=0.05, weight_decay=DECAY, placement="regularized", fused=False)
    kind = torch.optim.SGD if route == "torch's step" else torch.optim.Adam
    plain = kind(twin.parameters(), lr=0.05)
    for step in range(3):
        g = _gradient(model, step)
        optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(0.0)
        _take(optimizer, model, g * scale)
        _take(plain, twin, center(g + DECAY * twin.weight.detach(), "o [i]"))
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ["attached", "fused"])
def test_weight_decay_may_change_during_training(route: str) -> None:
    model = _model()
    twin = copy.deepcopy(model)
    if route == "fused":
        optimizer: Optimizer = gradcentral.Adam(model, lr=0.05, placement="regularized")
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        centralize(optimizer, model, "regularized")
    plain = torch.optim.Adam(twin.parameters(), lr=0.05)
    for step, decay in enumerate((0.0, DECAY, DECAY, 0.0, 2 * DECAY)):
        optimizer.param_groups[0]["weight_decay"] = decay
        g = _gradient(model, step)
        _take(optimizer, model, g)
        _take(plain, twin, center(g + decay * twin.weight.detach(), "o [i]"))
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
def test_gradients_may_have_other_strides_than_the_weights(strides: str) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "weight_decay": DECAY}, {"params": model[1].parameters()}], lr=1.0
    )
    centralize(optimizer, model, "regularized")
    before = [layer.weight.detach().clone() for layer in (model[0], model[1])]
    gradients = []
    for w in before:
        g = torch.randn(w.shape[1], w.shape[0], dtype=torch.float64).T + 0.5
        gradients.append(g if strides == "transposed" else g[:, :1].expand_as(w))
    for layer, g in zip((model[0], model[1]), gradients, strict=True):
        layer.weight.grad = g.clone() if strides == "transposed" else g
    optimizer.step()
    for layer, w, g, decay in zip((model[0], model[1]), before, gradients, (DECAY, 0.0), strict=True):
        torch.testing.assert_close(layer.weight.detach(), w - center(g + decay * w, "o [i]"), rtol=0, atol=1e-14)


class Unknown(Optimizer):
    """An optimizer of another library, with decoupled weight decay."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of gradient descent."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1 * p.grad + 0.1 * group["weight_decay"] * p)


def test_unknown_weight_decay_raises_and_the_remedy_centers_it() -> None:
    model = _model()
    optimizer = Unknown(model.parameters(), DECAY)
    with pytest.raises(ValueError, match=r"whether that of Unknown is L2 or decoupled is unknown: use placement='upda"):
        centralize(optimizer, model, "regularized")
    w, g = model.weight.detach().clone(), _gradient(model, 0)
    centralize(optimizer, model, placement="update")
    _take(optimizer, model, g)
    torch.testing.assert_close(model.weight.detach(), w - 0.1 * center(g + DECAY * w, "o [i]"), rtol=0, atol=1e-14)


def test_without_weight_decay_an_unknown_optimizer_is_accepted_until_it_has_some() -> None:
    model = _model()
    optimizer = Unknown(model.parameters())
    centralize(optimizer, model, "regularized")
    w, g = model.weight.detach().clone(), _gradient(model, 0)
    _take(optimizer, model, g)
    torch.testing.assert_close(model.weight.detach(), w - 0.1 * center(g, "o [i]"), rtol=0, atol=1e-14)
    optimizer.param_groups[0]["weight_decay"] = DECAY
    with pytest.raises(ValueError, match="is unknown"):
        optimizer.step()


def test_an_optimizer_derived_from_torchs_has_its_weight_decay() -> None:
    class Mine(torch.optim.RMSprop):
        pass

    model = _model()
    l2 = l2_of(Mine(model.parameters(), weight_decay=DECAY))
    assert l2.factors == {model.weight: DECAY}
    assert l2.of(model.weight) == DECAY
    assert l2.of(nn.Parameter(torch.ones(1))) == 0
