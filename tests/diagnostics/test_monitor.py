"""Monitor: its readings, the gradient that it records, and its absence of side effects on training."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, Optimizer

import gradcentral
from gradcentral import centralize, weight_layout
from gradcentral.diagnostics.drift import Drift
from gradcentral.diagnostics.monitor import Monitor, RecordBuffer
from gradcentral.diagnostics.record import Reading, Record, plot_records
from gradcentral.plotting import DARK


def _model() -> Any:  # indexing nn.Sequential gives a type without weights
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def _loss(model: nn.Module) -> Tensor:
    x = torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10
    output: Tensor = model(x.to(next(model.parameters()).dtype))
    return (output - 1).square().mean()


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    torch.autograd.backward(_loss(model))


def _train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        _backward(model)
        optimizer.step()


def _raw_norm(model: nn.Module) -> float:
    """Return the norm of the gradient at the current weights."""
    gradients = torch.autograd.grad(_loss(model), list(model.parameters()))
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def _remedy(error: Exception, model: nn.Module, optimizer: Optimizer) -> Any:
    """Run the code that an error message suggests."""
    code = str(error).partition("; use ")[2]
    names = {"Monitor": Monitor, "weight_layout": weight_layout, "model": model, "optimizer": optimizer}
    return eval(code, names)


# Readings.


def test_readings_match_hand_computed_values() -> None:
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    optimizer = SGD(model.parameters(), lr=1.0)
    monitor = Monitor(model, optimizer, every=1)
    gradient = torch.tensor([[4.0, 0.0], [0.0, -3.0]], dtype=torch.float64)
    for _ in range(2):
        model.weight.grad, model.bias.grad = gradient.clone(), torch.tensor([12.0, 0.0], dtype=torch.float64)
        optimizer.step()
    first, second = monitor.records
    layer, net = second.layers["weight"], second.net
    # Φ(g) = [[2, −2], [1.5, −1.5]]: 8 + 4.5 of 25 remain.
    assert layer.share == pytest.approx(0.5, abs=1e-15)
    assert (layer.norm, layer.largest, layer.centered_largest) == (5.0, 4.0, 2.0)
    assert layer.centered_norm == pytest.approx(math.sqrt(12.5), abs=1e-15)
    # With the bias's 12², the net has energy 169, of which 12.5 is removed.
    assert net.norm == pytest.approx(13.0)
    assert net.centered_norm == pytest.approx(math.sqrt(169 - 12.5))
    assert net.share == pytest.approx(12.5 / 169)
    assert (net.largest, net.centered_largest) == (12.0, 12.0)
    # One step changed the rows' means by −2 and 1.5; drift is √2 times that. The sums were 3 and 1.
    assert (first.layers["weight"].drift, first.layers["weight"].largest_drift) == (0.0, 0.0)
    assert layer.largest_drift == pytest.approx(2 * math.sqrt(2))
    assert layer.drift == pytest.approx(math.sqrt(8 + 4.5))
    assert first.layers["weight"].largest_sensitivity == 3.0
    assert first.layers["weight"].sensitivity == pytest.approx(math.sqrt((9 + 1) / 2))
    assert layer.largest_sensitivity == 4.0  # 3 − 4 and 1 + 3
    assert (first.step, second.step) == (0, 1)
    assert set(second.layers) == {"weight"}
    assert (net.drift, net.largest_sensitivity) == (layer.drift, layer.largest_sensitivity)


def test_drift_of_the_net_covers_all_weight_vectors() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=3)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    _train(model, optimizer, 3)
    moved = [
        math.sqrt(w.shape[1]) * (model[i].weight.detach() - w).mean(1) for i, w in zip((0, 2), before, strict=True)
    ]
    _train(model, optimizer, 1)
    net = monitor.records[-1].net
    assert net.drift == pytest.approx(float(torch.cat(moved).norm()))
    assert net.largest_drift == pytest.approx(float(torch.cat(moved).abs().max()))


def test_monitor_and_drift_agree() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    layout = weight_layout(model)
    drift, monitor = Drift(layout.items()), Monitor(model, optimizer, every=3, layout=layout)
    _train(model, optimizer, 3)
    total, of_one = drift.total(), float(drift.of(model[0].weight, layout[model[0].weight]).norm())
    _train(model, optimizer, 1)
    assert monitor.records[-1].net.drift == pytest.approx(total, rel=1e-12)
    assert monitor.records[-1].layers["0.weight"].drift == pytest.approx(of_one, rel=1e-12)


def test_phases_of_a_transposed_convolution_do_not_drift() -> None:
    """Each phase is a weight vector of its own: its sum stays, which the sum of a whole filter would not show."""
    model = nn.ConvTranspose1d(4, 3, 8, stride=4).double()
    start = model.weight.detach().clone()
    monitor = Monitor(model, optimizer := gradcentral.AdamW(model, lr=0.1, placement="update"), every=1)
    for _ in range(3):
        model.zero_grad()
        torch.autograd.backward(model(torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5)).square().sum())
        optimizer.step()
    assert (monitor.records[-1].layers["weight"].largest_drift or 0.0) < 1e-14
    phases, before = (weight.reshape(4, 3, 2, 4).sum((0, 2)) for weight in (model.weight.detach(), start))
    torch.testing.assert_close(phases, before, rtol=0, atol=1e-14)
    assert not torch.allclose(model.weight.detach(), start)


def test_drift_is_zero_under_update_and_not_under_plain_sgd() -> None:
    drifts = {}
    for placement in (None, "gradient", "update"):
        torch.manual_seed(0)
        model = _model()
        optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        if placement:
            centralize(optimizer, model, placement)
        monitor = Monitor(model, optimizer, every=5)
        _train(model, optimizer, 11)
        drifts[placement] = monitor.records[-1].net.largest_drift or 0.0
        assert monitor.records[-1].placement == placement
    assert drifts["update"] < 1e-14
    assert drifts["gradient"] > 1e-3  # from weight decay
    assert drifts[None] > 1e-2


def test_complex_weights_are_measured() -> None:
    model = nn.Linear(3, 2, bias=False, dtype=torch.complex128)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    model.weight.grad = torch.full((2, 3), 1j, dtype=torch.complex128)
    optimizer.step()
    optimizer.step()
    layer = monitor.records[-1].layers["weight"]
    assert layer.share == pytest.approx(1.0)
    assert layer.largest == 1.0
    assert layer.largest_drift == pytest.approx(0.1 * math.sqrt(3))
    assert layer.drift == pytest.approx(0.1 * math.sqrt(3) * math.sqrt(2))


# The recorded gradient.


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_raw_gradient_is_recorded_before_or_after_attaching_gc(order: str, placement: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    if order == "before":
        centralize(optimizer, model, placement)
    monitor = Monitor(model, optimizer, every=1)
    if order == "after":
        centralize(optimizer, model, placement)
    for _ in range(3):
        raw = _raw_norm(model)
        _train(model, optimizer, 1)
        record = monitor.records[-1]
        assert record.net.norm == pytest.approx(raw, rel=1e-12)
        assert (record.net.share or 0) > 0.01
        assert record.placement == placement


@pytest.mark.parametrize("algorithm", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_the_raw_gradient_is_recorded_with_gradcentrals_optimizers(algorithm: str, placement: str) -> None:
    model = _model()
    optimizer = getattr(gradcentral, algorithm)(model, lr=0.01, placement=placement)
    monitor = Monitor(model, optimizer, every=1)
    for _ in range(3):
        raw = _raw_norm(model)
        _train(model, optimizer, 1)
        assert monitor.records[-1].net.norm == pytest.approx(raw, rel=1e-12)
        assert monitor.records[-1].placement == placement


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", ["positional", "keyword", "None"])
def test_gradients_of_closures_are_recorded(how: str, order: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    if order == "before":
        centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=2)
    if order == "after":
        centralize(optimizer, model)
    start = [model[i].weight.detach().mean(1) for i in (0, 2)]
    model.zero_grad()

    def closure() -> float:
        _backward(model)
        return _loss(model).item()

    for step in range(4):
        raw = _raw_norm(model)
        if how == "positional":
            assert isinstance(optimizer.step(closure), float)
        elif how == "keyword":
            assert isinstance(optimizer.step(closure=closure), float)
        else:
            closure()
            optimizer.step(None)
        if step % 2 == 0:
            assert monitor.records[-1].net.norm == pytest.approx(raw, rel=1e-12)
    assert [record.step for record in monitor.records] == [0, 2]
    # GC still centered every gradient.
    for i, mean in zip((0, 2), start, strict=True):
        torch.testing.assert_close(model[i].weight.detach().mean(1), mean, rtol=0, atol=1e-14)


def test_lbfgs_is_recorded_once_per_step_at_its_first_weights() -> None:
    model = _model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")
    centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=1)

    def closure() -> float:
        _backward(model)
        return _loss(model).item()

    for _ in range(2):
        raw = _raw_norm(model)
        optimizer.step(closure)
        assert monitor.records[-1].net.norm == pytest.approx(raw, rel=1e-12)
    assert len(monitor.records) == 2


class TakesLoss(Optimizer):
    """An optimizer whose ``step`` takes the loss, like those with Polyak's step size."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, loss: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad
        return loss


class IgnoresClosure(TakesLoss):
    """An optimizer that accepts a closure and does not call it, like Ranger."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


@pytest.mark.parametrize("argument", [0.5, torch.tensor(0.5), None])
def test_a_loss_as_the_argument_of_step_is_passed_on(argument: Any) -> None:
    model = _model()
    optimizer = TakesLoss(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2)
    for step in range(4):
        raw = _raw_norm(model)
        _backward(model)
        assert optimizer.step(argument) is argument
        if step % 2 == 0:
            assert monitor.records[-1].net.norm == pytest.approx(raw, rel=1e-12)
    assert [record.step for record in monitor.records] == [0, 2]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_that_is_not_called_does_not_prevent_the_record(keyword: bool) -> None:
    model, written = _model(), list[Record]()
    optimizer = IgnoresClosure(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2, to=written.append)
    for step in range(4):
        raw, sums = _raw_norm(model), model[0].weight.detach().sum(1).abs().max()
        _backward(model)
        optimizer.step(closure=_loss) if keyword else optimizer.step(_loss)
        if step % 2 == 0:
            assert monitor.records[-1].net.norm == pytest.approx(raw, rel=1e-12)
            assert monitor.records[-1].layers["0.weight"].largest_sensitivity == pytest.approx(float(sums))
    assert [record.step for record in monitor.records] == [0, 2]
    assert written == monitor.records
    monitor.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class CallsSuper(SGD):
    """An optimizer whose step calls that of its base class, so that torch runs the hooks twice."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.fail:
            raise RuntimeError("after the step")
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("base", [SGD, gradcentral.SGD])
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(base: Any, with_closure: bool) -> None:
    model = _model()
    cls = CallsSuper if base is SGD else type("CallsOurs", (CallsSuper, base), {})
    optimizer = cls(model.parameters() if base is SGD else model, lr=0.1)
    monitor = Monitor(model, optimizer, every=2)

    def closure() -> float:
        _backward(model)
        return _loss(model).item()

    def step() -> None:
        if with_closure:
            optimizer.step(closure)
        else:
            _backward(model)
            optimizer.step()

    for _ in range(3):
        step()
    assert [record.step for record in monitor.records] == [0, 2]
    assert monitor.step == 3
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="after the step"):
        step()
    optimizer.fail = False
    for _ in range(3):
        step()
    assert [record.step for record in monitor.records] == [0, 2, 4, 6]
    assert monitor.step == 7
    monitor.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_that_raises_leaves_no_record_for_the_next() -> None:
    class Failing(SGD):
        fail = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.fail:
                raise RuntimeError("no step")

    model = _model()
    optimizer = Failing(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step(_loss)
    optimizer.fail = False
    optimizer.step(_loss)
    assert monitor.records == []
    optimizer.step(_loss)
    assert [record.step for record in monitor.records] == [2]


def test_the_share_is_zero_after_centralize_gradients() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    _backward(model)
    gradcentral.centralize_gradients(model)
    optimizer.step()
    assert (monitor.records[-1].net.share or 0) < 1e-20


# GradScaler.


def _scaled_optimizers(model: nn.Module) -> dict[str, Optimizer]:
    return {
        "torch": SGD(model.parameters(), lr=0.1),
        "torch fused": SGD(model.parameters(), lr=0.1, fused=True),
        "gradcentral": gradcentral.SGD(model, lr=0.1),
        "gradcentral fused": gradcentral.SGD(model, lr=0.1, fused=True),
    }


@pytest.mark.parametrize("name", ["torch", "torch fused", "gradcentral", "gradcentral fused"])
def test_norms_are_unscaled_under_grad_scaler(name: str) -> None:
    model = _model().float()
    optimizer = _scaled_optimizers(model)[name]
    monitor = Monitor(model, optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    raw = _raw_norm(model)
    torch.autograd.backward(scaler.scale(_loss(model)))
    scaler.step(optimizer)
    scaler.update()
    record = monitor.records[-1]
    assert record.net.norm == pytest.approx(raw, rel=1e-5)
    assert not record.skipped


@pytest.mark.parametrize("name", ["torch", "torch fused", "gradcentral", "gradcentral fused"])
def test_a_step_skipped_by_grad_scaler_is_marked(name: str) -> None:
    model = _model().float()
    optimizer = _scaled_optimizers(model)[name]
    monitor = Monitor(model, optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    torch.autograd.backward(scaler.scale(_loss(model)))
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    if "fused" not in name:  # GradScaler did not call step()
        assert monitor.step == 0
        assert not monitor.records
        return
    record = monitor.records[-1]
    assert record.skipped
    assert (record.net.norm, record.net.share, record.net.largest) == (None, None, None)
    assert record.layers["0.weight"].centered_norm is None
    assert record.layers["2.weight"].norm is not None
    assert record.net.sensitivity is not None
    assert '"skipped": true' in record.to_line()
    assert "NaN" not in record.to_line()
    assert Record.from_line(record.to_line()).net.norm is None


def test_nan_in_one_gradient_clears_the_readings_of_its_layer_and_the_net_only() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    _backward(model)
    model[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    record = monitor.records[-1]
    gradient = ("share", "norm", "centered_norm", "largest", "centered_largest")
    assert [getattr(record.net, name) for name in gradient] == [None] * 5
    assert [getattr(record.layers["2.weight"], name) for name in gradient] == [None] * 5
    assert None not in [getattr(record.layers["0.weight"], name) for name in gradient]
    assert not record.skipped


# Training is unchanged.


@pytest.mark.parametrize("kind", ["plain", "gradient", "update", "fused", "closure"])
def test_training_is_bit_identical(kind: str) -> None:
    def train(watched: bool) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "fused":
            optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9)
        elif kind != "plain":
            centralize(optimizer, model, "update" if kind == "update" else "gradient")
        if watched:
            Monitor(model, optimizer, every=2)
        for _ in range(7):
            if kind == "closure":
                optimizer.step(lambda: _backward(model))
            else:
                _backward(model)
                optimizer.step()
        return list(model.parameters()), optimizer.state_dict()

    weights, state = train(watched=False)
    watched, watched_state = train(watched=True)
    assert all(torch.equal(p, q) for p, q in zip(weights, watched, strict=True))
    assert watched_state["param_groups"] == state["param_groups"]
    assert watched_state["state"].keys() == state["state"].keys()


def test_a_monitor_keeps_neither_optimizer_nor_gradients_alive() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    _train(model, optimizer, 1)
    gradient, alive = weakref.ref(model[0].weight.grad), weakref.ref(optimizer)
    gc.disable()
    try:
        model.zero_grad()
        assert gradient() is None
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    monitor.remove()


def test_remove_stops_recording_and_can_be_called_twice() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model)
    with Monitor(model, optimizer, every=1) as monitor:
        _train(model, optimizer, 2)
    _train(model, optimizer, 2)
    monitor.remove()
    assert [record.step for record in monitor.records] == [0, 1]
    assert monitor.step == 2
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    handle.remove()


# The layout.


def test_the_layout_follows_the_attached_gc() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))

    def step() -> Record:
        model.zero_grad()
        model(torch.rand(3, 1, 3, 3)).square().mean().backward()
        optimizer.step()
        return monitor.records[-1]

    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    assert set(step().layers) == {"0.weight", "2.weight"}
    handle = centralize(optimizer, layout=weight_layout(model, only="conv"))
    assert set(step().layers) == {"0.weight"}
    with handle.paused():
        paused = step()
    assert set(paused.layers) == {"0.weight"}
    assert paused.placement is None
    handle.remove()
    assert set(step().layers) == {"0.weight", "2.weight"}
    monitor.remove()
    centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=1, layout=weight_layout(model, exclude=["0.*"]))
    assert set(step().layers) == {"2.weight"}


def test_two_models_in_one_optimizer_are_told_apart() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = SGD([*one.parameters(), *other.parameters()], lr=0.1)
    centralize(optimizer, other, "update")
    monitor = Monitor(one, optimizer, every=1)
    both = Monitor(nn.ModuleList([one, other]), optimizer, every=1)
    for model in (one, other):
        model(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    assert monitor.records[-1].placement is None
    assert set(monitor.records[-1].layers) == {"weight"}
    assert both.records[-1].placement == "update"
    assert set(both.records[-1].layers) == {"1.weight"}


def test_parameters_added_later_are_monitored() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=1)
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    assert set(monitor.records[-1].layers) == {"0.weight", "1.weight"}
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    assert set(monitor.records[-1].layers) == {"0.weight", "1.weight", "2.weight"}
    assert monitor.records[-1].layers["2.weight"].drift == 0


@pytest.mark.parametrize("kind", ["plain", "attached", "fused", "attached after the monitor"])
def test_pruned_weights_are_no_longer_recorded(kind: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = gradcentral.SGD(model, lr=0.1) if kind == "fused" else SGD(model.parameters(), lr=0.1)
    if kind == "attached":
        centralize(optimizer, model)
    monitor = Monitor(model, optimizer, every=1)
    if kind == "attached after the monitor":
        centralize(optimizer, model)
    changes: list[tuple[Any, set[str]]] = [
        (lambda layer: None, {"0.weight", "1.weight"}),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), {"1.weight"}),
        (lambda layer: prune.remove(layer, "weight"), {"0.weight", "1.weight"}),
    ]
    for change, expected in changes:
        change(model[0])
        optimizer.zero_grad()
        model(torch.rand(5, 4)).square().sum().backward()
        optimizer.step()
        assert set(monitor.records[-1].layers) == expected


def test_unused_sparse_and_empty_parameters_are_handled() -> None:
    names = ("unused", "empty", "used")
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), **{name: nn.Linear(3, 2) for name in names}})
    model["empty"].weight = nn.Parameter(torch.empty(0, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    model["used"](model["table"](torch.tensor([1, 1, 4]))).square().sum().backward()
    optimizer.step()
    record = monitor.records[-1]
    assert set(record.layers) == {"unused.weight", "used.weight"}
    assert record.layers["unused.weight"].norm is None
    assert record.layers["unused.weight"].drift == 0
    gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 3
    assert record.net.norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-6)


# Resuming.


def test_a_resumed_monitor_matches_an_uninterrupted_one() -> None:
    def train(model: nn.Module, steps: int, state: dict[str, Any] | None = None) -> Monitor:
        optimizer = SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, optimizer, every=2)
        if state is not None:
            monitor.load_state_dict(state)
        _train(model, optimizer, steps)
        return monitor

    whole, parted = _model(), _model()
    parted.load_state_dict(whole.state_dict())
    expected = train(whole, 9).records
    first = train(parted, 5)
    second = train(parted, 4, first.state_dict())
    assert [*first.records, *second.records] == expected
    assert second.state_dict()["step"] == 9


def test_loading_an_earlier_state_drops_later_records() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2)
    _train(model, optimizer, 5)
    weights, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, monitor.state_dict()
    _train(model, optimizer, 6)
    expected = monitor.records
    model.load_state_dict(weights)
    monitor.load_state_dict(state)
    assert [record.step for record in monitor.records] == [0, 2, 4]
    _train(model, optimizer, 6)
    assert monitor.records == expected
    assert [record.step for record in expected] == [0, 2, 4, 6, 8, 10]


def test_the_state_of_another_model_raises() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    with pytest.raises(ValueError, match="state: 0.weight is not a parameter .* of a monitor of this model"):
        monitor.load_state_dict({"step": 0, "start": {"0.weight": torch.zeros(2)}})
    monitor.load_state_dict(Monitor(model, optimizer).state_dict())
    optimizer.step()
    monitor.load_state_dict(Monitor(other, SGD(other.parameters(), lr=0.1)).state_dict())
    with pytest.raises(ValueError, match="state: weight has different weight vectors .*; attach a new Monitor"):
        optimizer.step()
    monitor.remove()
    monitor = Monitor(model, optimizer)
    optimizer.step()
    assert monitor.records[0].net.drift == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_keeps_records_and_state_and_is_not_attached(duplicate: Callable[[Any], Any], tmp_path: Any) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2, to=tmp_path / "run.jsonl", name="net")
    _train(model, optimizer, 3)
    other = duplicate(monitor)
    records = monitor.records
    assert (other.records, other.step, other.name) == (records, 3, "net")
    assert other.plot().axes
    _train(model, optimizer, 3)
    assert other.records == records
    assert len(monitor.records) == 3
    other.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert [record.step for record in Monitor.read(tmp_path / "run.jsonl")] == [0, 2, 4]
    again = Monitor(model, SGD(model.parameters(), lr=0.1), every=2)
    again.load_state_dict(other.state_dict())
    assert again.step == 3


def test_a_copy_of_a_model_that_holds_its_monitor_works() -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.monitor = Monitor(model, optimizer, every=1)
    averaged = copy.deepcopy(model)
    _train(model, optimizer, 2)
    assert len(model.monitor.records) == 2
    assert averaged.monitor.records == []


# Errors.


def test_a_failing_measurement_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1)
    before = model[0].weight.detach().clone()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("gradcentral.diagnostics.monitor.measure", fail)
    with pytest.warns(
        UserWarning, match="Monitor: step 0 was not recorded .*OutOfMemoryError: out of memory"
    ) as caught:
        _train(model, optimizer, 2)
    assert len(caught) == 1
    assert not torch.equal(model[0].weight, before)
    monkeypatch.undo()
    _train(model, optimizer, 1)
    assert [record.step for record in monitor.records] == [2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, not 0"),
        ({"every": 2.5}, TypeError, "every must be an integer, not float"),
        ({"step": -1}, ValueError, "step must be at least 0, not -1"),
        ({"to": 3}, TypeError, "to must be a path .* not int"),
        ({"name": ""}, ValueError, "name must be one line of text, such as 'generator', not ''"),
        ({"name": "a\nb"}, ValueError, "name must be one line of text"),
    ],
)
def test_wrong_arguments_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        Monitor(model, optimizer, **arguments)
    assert not optimizer._optimizer_step_pre_hooks


def test_wrong_models_and_optimizers_raise() -> None:
    model, other = _model(), _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not SGD; use Monitor\(.*\)") as caught:
        Monitor(optimizer, model)  # type: ignore[arg-type]
    assert isinstance(_remedy(caught.value, model, optimizer), Monitor)
    with pytest.raises(TypeError, match=r"layout must be a WeightLayout, not str; use weight_layout\(.*\)") as caught:
        Monitor(model, optimizer, layout="conv")  # type: ignore[arg-type]
    Monitor(model, optimizer, layout=_remedy(caught.value, model, optimizer))
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer"):
        Monitor(model, model)
    with pytest.raises(ValueError, match="optimizer: contains none of the model's parameters; pass the model it was"):
        Monitor(other, optimizer)
    changed = _model()
    before = SGD(changed.parameters(), lr=0.1)
    changed[0], changed[2] = nn.Linear(4, 6), nn.Linear(6, 3)
    with pytest.raises(ValueError, match="create it after moving, wrapping or sharding the model"):
        Monitor(changed, before)
    Monitor(changed, SGD(changed.parameters(), lr=0.1))
    norm = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="layout: nothing in this optimizer is centered"):
        Monitor(norm, SGD(norm.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="layout: nothing in this optimizer is centered"):
        Monitor(model, optimizer, layout=weight_layout(model, exclude=["*"]))


# Records in memory, and the plot.


@pytest.mark.parametrize("limit", [2, 3, 8, 9])
def test_the_buffer_is_bounded_evenly_spaced_and_has_the_first_and_newest_record(limit: int) -> None:
    buffer = RecordBuffer(limit)
    for step in range(100):
        buffer.add(Record(step, None, False, Reading(), {}))
        steps = [record.step for record in buffer.records]
        assert len(steps) <= limit
        assert (steps[0], steps[-1]) == (0, step)
        gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
        assert len(gaps) <= 1
        assert steps == list(range(step + 1)) or len(steps) > limit // 2


@pytest.mark.parametrize("limit", [2, 3, 8, 9])
@pytest.mark.parametrize("back", [0, 1, 37, 60, 99])
def test_the_buffer_rewinds(limit: int, back: int) -> None:
    buffer = RecordBuffer(limit)
    for step in range(100):
        buffer.add(Record(step, None, False, Reading(), {}))
    before = [record.step for record in buffer.records if record.step < back]
    buffer.rewind(back)
    assert [record.step for record in buffer.records] == before
    for step in range(back, back + 50):
        buffer.add(Record(step, None, False, Reading(), {}))
        steps = [record.step for record in buffer.records]
        assert steps == sorted(set(steps))
        assert len(steps) <= limit
        assert (steps[0], steps[-1]) == (0, step)
        if back == 0:
            assert steps == list(range(step + 1)) or len(steps) > limit // 2


def test_rewinding_beyond_the_newest_record_changes_nothing() -> None:
    buffer, other = RecordBuffer(4), RecordBuffer(4)
    for step in range(23):
        buffer.add(Record(step, None, False, Reading(), {}))
        other.add(Record(step, None, False, Reading(), {}))
        buffer.rewind(step + 1)
    assert buffer.records == other.records


def test_records_stay_evenly_spaced_after_a_later_state_was_loaded() -> None:
    buffer = RecordBuffer(8, every=20)
    for step in (0, *range(1000, 2000, 20)):
        buffer.add(Record(step, None, False, Reading(), {}))
    steps = [record.step for record in buffer.records]
    assert len(steps) > 4
    assert {b - a for a, b in itertools.pairwise(steps[1:-1])} == {160}


def test_the_plot_shows_the_records(tmp_path: Any) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=2, to=tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match="records: empty; the first record is created at the first step"):
        monitor.plot()
    _train(model, optimizer, 1)
    monitor.plot().savefig(tmp_path / "one.png")
    _train(model, optimizer, 8)
    figure = monitor.plot(DARK)
    norm, _, drift, _, shares, _ = figure.axes
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles[:3] == ["Gradient norm", "Largest entry of the gradient", "Drift  ‖eᵀ(w − w⁰)‖"]
    before, after = norm.lines
    assert list(before.get_xdata()) == [0, 2, 4, 6, 8]
    assert list(before.get_ydata()) == [record.net.norm for record in monitor.records]
    assert after.get_label() == "if it were centered"
    assert list(drift.lines[1].get_ydata()) == [record.net.drift for record in monitor.records]
    assert [label.get_text() for label in shares.get_yticklabels()] == ["0.weight", "2.weight"]
    figure.savefig(tmp_path / "several.png")
    again = plot_records(Monitor.read(tmp_path / "run.jsonl"))
    assert list(again.axes[0].lines[0].get_ydata()) == pytest.approx(list(before.get_ydata()), rel=1e-5)


def test_the_plot_has_gaps_where_a_gradient_is_not_finite(tmp_path: Any) -> None:
    readings: list[Callable[[], Reading]] = [lambda: Reading(share=0.5, norm=1.0), Reading, Reading]
    records = [Record(step, "update", True, make(), {"weight": make()}) for step, make in enumerate(readings)]
    figure = plot_records(records)
    figure.savefig(tmp_path / "gaps.png")
    values = list(figure.axes[0].lines[0].get_ydata())
    assert values[0] == 1.0
    assert all(map(math.isnan, values[1:]))
    assert figure.axes[0].lines[1].get_label() == "after centering (update)"


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_readings_of_very_small_and_very_large_gradients(scale: float) -> None:
    model = _model().float()
    optimizer = SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, every=1) as monitor:
        for factor in (1.0, scale):
            _backward(model)
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= factor
            optimizer.step()
    usual, scaled = (record.net for record in monitor.records)
    assert scaled.share == pytest.approx(usual.share, rel=1e-4)
    for name in ("norm", "centered_norm", "largest", "centered_largest"):
        assert getattr(scaled, name) == pytest.approx(getattr(usual, name) * scale, rel=1e-4)
