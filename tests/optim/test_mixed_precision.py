"""Mixed precision: autocast, loss scaling with every kind of optimizer, and parameters in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral.kernels import native, triton
from gradcentral.projection import center_regularized, restore_means_, unit_means
from gradcentral.targets import PLACEMENTS
from tests.optim.creation import create_optimizer

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}
# GC attached or in gradcentral's optimizer, with and without fused=True: torch's fused kernels unscale the gradients.
VARIANTS: dict[str, tuple[str, bool | None]] = {
    "attached": ("attached", None),
    "attached, fused": ("attached", True),
    "gradcentral": ("gradcentral", None),
    "gradcentral, fused": ("gradcentral", True),
}


def _make(variant: str, kind: str, model: nn.Module, placement: str) -> Optimizer:
    who, fused = VARIANTS[variant]
    options = OPTIONS[kind] | {"fused": fused}
    return create_optimizer(who, kind, model, placement, options)


def _network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)


def _loss(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


def _snapshot(model: nn.Module, optimizer: Optimizer) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two nested structures of tensors are bit-identical."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in (native, triton):
        monkeypatch.setattr(kernels, "_unavailable", "turned off by a test")


def every_optimizer(test: Callable[..., None]) -> Callable[..., None]:
    for name, values in (("placement", PLACEMENTS), ("kind", OPTIONS), ("variant", VARIANTS)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@every_optimizer
def test_scaled_steps_equal_unscaled_ones(variant: str, kind: str, placement: str) -> None:
    """The scale is a power of two, so scaling and unscaling are exact."""
    model, reference = _network(), _network()
    optimizer, plain = _make(variant, kind, model, placement), _make(variant, kind, reference, placement)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for opt in (optimizer, plain):
            opt.zero_grad()
        scaler.scale(_loss(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        _loss(reference, step).backward()
        plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@every_optimizer
def test_a_skipped_step_changes_nothing(variant: str, kind: str, placement: str, bad: float) -> None:
    """Weights, state and step counters are unchanged, and the next step is the same as without the skipped one."""
    model = _network()
    optimizer = _make(variant, kind, model, placement)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(number: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        scaler.scale(_loss(model, number) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(0)
    before = _snapshot(model, optimizer)
    step(1, bad)
    assert scaler.get_scale() == 2.0**9
    assert _equal(_snapshot(model, optimizer), before)
    twin = _network()
    resumed = _make(variant, kind, twin, placement)
    twin.load_state_dict(before[0])
    resumed.load_state_dict(before[1])
    _loss(twin, 2).backward()
    resumed.step()
    step(2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@every_optimizer
def test_a_skipped_first_step_changes_nothing(variant: str, kind: str, placement: str) -> None:
    model = _network()
    optimizer = _make(variant, kind, model, placement)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(_loss(model, 0) * torch.inf).backward()
    scaler.step(optimizer)
    assert _equal(model.state_dict(), before)
    if (variant, kind) == ("attached, fused", "SGD"):
        return  # torch 2.13 has then created a momentum buffer with uninitialized values
    # State that exists at this point is zero, and no step has been counted.
    for state in optimizer.state.values():
        assert not any(value.any() for value in state.values() if isinstance(value, Tensor))


@every_optimizer
def test_autocast_in_bfloat16_centers_gradients_in_float32(variant: str, kind: str, placement: str) -> None:
    """A step equals that of torch's optimizer on gradients that are centered by hand."""
    model, reference = _network(), _network()
    optimizer = _make(variant, kind, model, placement)
    plain = getattr(torch.optim, kind)(reference.parameters(), **OPTIONS[kind])
    layout = gradcentral.weight_layout(reference)
    for step in range(3):
        for net, opt in ((model, optimizer), (reference, plain)):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = net(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(step)))
            assert output.dtype == torch.bfloat16
            output.float().square().mean().backward()
        means = {p: unit_means(p.detach(), v) for p, v in layout.items()}
        if placement != "update":
            for p, vectors in layout.items():
                assert p.grad is not None
                assert p.grad.dtype == torch.float32
                decay = OPTIONS[kind].get("weight_decay", 0.0)
                l2 = decay if placement == "regularized" and kind != "AdamW" else 0.0
                p.grad = center_regularized(p.grad, p.detach(), l2, vectors)
        plain.step()
        if placement == "update":
            with torch.no_grad():
                for p, vectors in layout.items():
                    restore_means_(p, means[p], vectors)
        optimizer.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
        # Compare single steps: bfloat16 activations would amplify rounding errors of the weights.
        model.load_state_dict(reference.state_dict())


@every_optimizer
def test_parameters_in_bfloat16_stay_close_to_those_in_float64(variant: str, kind: str, placement: str) -> None:
    """With the same bfloat16 gradients, the weights differ only by rounding of weights and state."""
    if kind == "SGD" and variant == "attached, fused":
        pytest.skip("torch 2.13's own fused SGD loses the momentum in bfloat16 on the CPU, with or without GC")
    model, reference = _network(torch.bfloat16), _network(torch.bfloat16).double()
    optimizer, exact = _make(variant, kind, model, placement), _make(variant, kind, reference, placement)
    start = [p.detach().clone() for p in reference.parameters()]
    for step in range(5):
        optimizer.zero_grad()
        _loss(model, step, torch.bfloat16).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        optimizer.step()
        exact.step()
    change = error = 0.0
    for param, truth, w in zip(model.parameters(), reference.parameters(), start, strict=True):
        assert param.dtype == torch.bfloat16
        found, wanted = param.detach().double(), truth.detach()
        # Half a unit in the last place (2⁻⁹ to 2⁻⁸ of a weight) per step, and as much from the state.
        torch.testing.assert_close(found, wanted, rtol=10 * 2.0**-9, atol=5e-3)
        change += float((wanted - w).square().sum())
        error += float((found - wanted).square().sum())
    assert error < 0.02 * change


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fused_sgd_without_kernels_equals_torchs_unfused_step(
    placement: str, dtype: torch.dtype, compiled: bool, without_kernels: None
) -> None:
    """torch's own fused step does not even move these weights."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    model, reference = (nn.Linear(4, 3).to(dtype) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    optimizer = gradcentral.SGD(model, fused=True, placement=placement, **options)
    plain = torch.optim.SGD(reference.parameters(), **options)
    gradcentral.centralize(plain, reference, placement)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    start = model.weight.detach().clone()
    for _ in range(4):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            gradient = torch.randn(p.shape).to(dtype) * 0.1
            p.grad, q.grad = gradient, gradient.clone()
        step()
        plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4e-3)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
    assert float((model.weight.detach() - start).abs().max()) > 0.02
    assert all(group["fused"] is True for group in optimizer.param_groups)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fused_sgd_without_kernels_unscales_gradients_and_skips_steps(placement: str, without_kernels: None) -> None:
    """After a skipped first step, torch's own fused SGD trains with an uninitialized momentum."""
    model, reference = _network(), _network()
    optimizer = _make("gradcentral, fused", "SGD", model, placement)
    plain = _make("attached", "SGD", reference, placement)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, factor in enumerate([torch.inf, 1.0, 1.0, torch.nan, 1.0]):
        optimizer.zero_grad()
        scaler.scale(_loss(model, step) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            plain.zero_grad()
            _loss(reference, step).backward()
            plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"], rtol=0, atol=1e-6
        )


def test_a_found_inf_on_the_device_is_read_before_torchs_step(without_kernels: None) -> None:
    """On a CUDA device, where the kernels would read it themselves."""
    optimizer = gradcentral.SGD(nn.Linear(4, 3), lr=0.1, momentum=0.9, fused=True)
    assert optimizer._needs_found_inf([], complete=False)
    assert not optimizer._needs_found_inf([], complete=True)
    adam = gradcentral.Adam(nn.Linear(4, 3), fused=True)
    assert not adam._needs_found_inf([], complete=False)
