"""Under an active dispatch mode (``make_fx``, loggers, counters) every operator of a step passes through the mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import gradcentral
from gradcentral.kernels.planner import kernels_for
from gradcentral.targets import PLACEMENTS


class Writes(TorchDispatchMode):
    """Counts, per storage, the operators that write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for argument, declared in zip(args, function._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                tensors = argument if isinstance(argument, (list, tuple)) else [argument]
                self.written.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
        return result


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def _optimizer(model: nn.Module, kind: str, algorithm: str, placement: str) -> Optimizer:
    options: dict[str, Any] = {"lr": 0.1, **({"momentum": 0.9} if algorithm == "SGD" else {})}
    if kind == "own":
        made: Optimizer = getattr(gradcentral, algorithm)(model, placement=placement, **options)
        return made
    optimizer: Optimizer = getattr(torch.optim, algorithm)(model.parameters(), **options)
    gradcentral.centralize(optimizer, model, placement)
    return optimizer


def _set_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape).square() + 1


def _assert_close(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("algorithm", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", ["own", "attached"])
def test_a_mode_sees_every_write_and_the_steps_around_it_continue(kind: str, algorithm: str, placement: str) -> None:
    model = _model()
    reference = copy.deepcopy(model)
    optimizer, usual = (_optimizer(m, kind, algorithm, placement) for m in (model, reference))
    for step in range(3):  # the first and the last without a mode, by the kernels
        _set_gradients(model)
        _set_gradients(reference)
        usual.step()
        if step != 1:
            optimizer.step()
            continue
        with Writes() as writes:
            assert kernels_for(torch.ones(2)) is None
            optimizer.step()
        written = list(model.parameters())
        if kind == "attached" and placement == "gradient":
            written += [p.grad for p in model.parameters() if p.ndim == 2]  # type: ignore[misc]
        assert {tensor.untyped_storage().data_ptr() for tensor in written} <= writes.written
    _assert_close(model, reference)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["own", "attached"])
def test_a_graph_traced_by_make_fx_takes_the_step(kind: str, placement: str) -> None:
    model = _model()
    reference = copy.deepcopy(model)
    optimizer, usual = (_optimizer(m, kind, "SGD", placement) for m in (model, reference))
    for m, o in ((model, optimizer), (reference, usual)):
        _set_gradients(m)
        o.step()
    start = copy.deepcopy(model)
    usual.step()

    def step(*gradients: Tensor) -> list[Tensor]:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    gradients = [p.grad for p in reference.parameters()]
    graph = make_fx(step)(*(g.clone() for g in gradients if g is not None))
    for p, q in zip(model.parameters(), start.parameters(), strict=True):  # tracing took the step
        p.data.copy_(q)
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    with torch.no_grad():
        found = graph(*(g.clone() for g in gradients if g is not None))
    # The graph captures the weights and the momentum, which is zero now.
    plain = _optimizer(start, kind, "SGD", placement)
    plain.param_groups[0]["momentum"] = 0.0
    for p, g in zip(start.parameters(), gradients, strict=True):
        p.grad = g
    plain.step()
    for weight, p in zip(found, start.parameters(), strict=True):
        torch.testing.assert_close(weight, p.detach(), rtol=1e-5, atol=1e-5)
