"""Times of one optimizer step: plain, with the usual loops, and ours, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral.bench.device import copying
from gradcentral.bench.shapes import Shape
from gradcentral.kernels import native
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.weight_vectors import WeightVectors

__all__ = ["ALGORITHMS", "ATTACHED", "BASELINE", "OURS", "STREAM", "STREAM_GRADIENTS", "alternatives"]

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    # Rates so small that thousands of steps with one gradient leave the numbers where they are.
    "SGD": ("SGD", {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": ("AdamW", {"lr": 1e-9, "weight_decay": 1e-2}),
}

BASELINE = "torch fused, no GC"
ATTACHED = "centralize + torch fused"
OURS = "gradcentral gradient"
STREAM = "streaming the same bytes"
STREAM_GRADIENTS = "streaming the gradients"


def alternatives(
    shapes: Iterable[Shape], algorithm: str, dtype: torch.dtype, device: str = "cpu", peers: bool = False
) -> dict[str, Callable[[], object]]:
    """What to time, by name: each a call that takes one step on the same parameters, gradients and state.

    The first is the baseline, and it stands there twice: the ratio of the two tells what the machine's noise alone
    makes.
    """
    kind, options = ALGORITHMS[algorithm]
    # torch captures no step of Adam in a CUDA graph without it; its fused step is the same with it.
    fused = {"fused": True, **({"capturable": True} if device != "cpu" and kind == "AdamW" else {})}
    params, layout = _model(shapes, dtype, device)
    pairs = list(layout.items())
    torchs = getattr(torch.optim, kind)
    plain = torchs(params, **fused, **options)
    plain.step()  # makes the state that all share

    def sharing(optimizer: Optimizer) -> Optimizer:
        optimizer.state = plain.state
        return optimizer

    def with_own_steps(optimizer: Optimizer) -> Optimizer:
        # torch's unfused step counts on the host; counters on a device it would wait for, one by one.
        for p, state in plain.state.items():
            optimizer.state[p] = {**state, "step": state["step"].cpu().clone()} if "step" in state else state
        return optimizer

    def naive_loop() -> None:
        for p, vectors in pairs:
            g = p.grad
            assert g is not None
            g.sub_(g.mean(vectors.span, keepdim=True))
        plain.step()

    hooked = sharing(torchs(params, **fused, **options))
    gradcentral.centralize(hooked, layout=layout)
    hooked_update = sharing(torchs(params, **fused, **options))
    gradcentral.centralize(hooked_update, layout=layout, placement="update")
    ours = getattr(gradcentral, kind)
    runs: dict[str, Callable[[], object]] = {
        BASELINE: plain.step,
        f"{BASELINE}, again": plain.step,
        "torch default, no GC": with_own_steps(torchs(params, **options)).step,
        "loop + torch fused": naive_loop,
        ATTACHED: hooked.step,
        "centralize update + torch fused": hooked_update.step,
        OURS: sharing(ours(params, layout=layout, **options)).step,
        "gradcentral update": sharing(ours(params, layout=layout, placement="update", **options)).step,
    }
    if peers:
        runs.update(_peers(plain, params))
    if not native.unavailable_reason() and device == "cpu":
        states = _states(plain, params)
        gradients: list[Tensor] = [p.grad for p in params if p.grad is not None]
        centered = [p.grad for p in layout if p.grad is not None]
        runs[STREAM] = lambda: native.stream(params, gradients, states)
        runs[STREAM_GRADIENTS] = lambda: native.stream(centered, centered, [])
    elif device != "cpu":
        touched = sum(p.nbytes for p in params) * (3 + 2 * len(_states(plain, params)))  # reads w, g; writes w; states
        runs[STREAM] = copying(params, touched)
        runs[STREAM_GRADIENTS] = copying(params, 2 * sum(p.nbytes for p in layout))
    return runs


def _model(shapes: Iterable[Shape], dtype: torch.dtype, device: str) -> tuple[list[Tensor], WeightLayout]:
    """Parameters of these shapes with gradients, and their layout."""
    generator = torch.Generator(device).manual_seed(0)
    model = nn.ParameterList()
    rules: dict[str, WeightVectors | None] = {}
    for name, (shape, vectors) in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
        p.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        model.append(p)
        rules[str(name)] = vectors
    return list(model), weight_layout(model, overrides=rules)  # type: ignore[arg-type]


def _states(optimizer: Optimizer, params: list[Tensor]) -> list[list[Tensor]]:
    names = [name for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if name in optimizer.state[params[0]]]
    return [[optimizer.state[p][name] for p in params] for name in names]


def _peers(plain: Optimizer, params: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Another library's GC before the same step, by its shape rule."""
    try:
        from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
    except ModuleNotFoundError as error:
        raise ValueError("--peers needs pytorch_optimizer: pip install pytorch-optimizer") from error

    def step() -> None:
        centralize_gradient([p.grad for p in params])
        plain.step()

    return {"pytorch_optimizer + torch fused": step}
