"""Optimizer steps to compare, with and without GC, on the same parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral import optim
from gradcentral.attach import centralize
from gradcentral.bench.cuda import copy_bytes
from gradcentral.bench.shapes import ParameterShape
from gradcentral.bench.timing import Call
from gradcentral.kernels import native
from gradcentral.layout import Entry, WeightLayout

__all__ = ["OPTIMIZERS", "create_layout", "optimizer_steps"]
__all__ += ["ATTACHED", "ATTACHED_UPDATE", "BASELINE", "BASELINE_AGAIN", "LOOP", "OURS", "OURS_UPDATE", "TORCH_DEFAULT"]
__all__ += ["STREAM", "STREAM_GRADIENTS"]

# With such a small learning rate, thousands of steps along one gradient hardly change the weights.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-9, "weight_decay": 1e-2},
}

BASELINE = "torch fused, no GC"
BASELINE_AGAIN = "torch fused, no GC, again"
TORCH_DEFAULT = "torch default, no GC"
LOOP = "loop + torch fused"
ATTACHED = "centralize + torch fused"
ATTACHED_UPDATE = "centralize update + torch fused"
OURS = "gradcentral gradient"
OURS_UPDATE = "gradcentral update"
STREAM = "streaming the same bytes"
STREAM_GRADIENTS = "streaming the gradients"


def optimizer_steps(
    shapes: Iterable[ParameterShape], optimizer: str, dtype: torch.dtype, device: str = "cpu", peers: bool = False
) -> dict[str, Call]:
    """Return the alternatives to time, by name; each call is one step on the same parameters, gradients and state.

    The baseline is included twice: the ratio of the two shows the noise of the machine. ``peers`` adds other libraries.
    """
    layout = create_layout(shapes, dtype, device)
    params = [entry.parameter for entry in layout.entries]
    options = OPTIMIZERS[optimizer]
    torch_class, own_class = getattr(torch.optim, optimizer), getattr(optim, optimizer)
    # A CUDA graph can capture Adam's step only with capturable=True, which does not change the fused step.
    fused = options | {"fused": True} | ({"capturable": True} if device != "cpu" and optimizer == "AdamW" else {})
    plain, default = torch_class(params, **fused), torch_class(params, **options)
    plain.step()  # creates the state that all alternatives share
    for p, state in plain.state.items():  # torch's default step keeps its step counters on the host
        default.state[p] = {**state, "step": state["step"].cpu().clone()} if "step" in state else state

    def step_of(other: Optimizer) -> Call:
        other.state = plain.state
        return other.step

    def attached(placement: str) -> Call:
        hooked = torch_class(params, **fused)
        centralize(hooked, layout=layout, placement=placement)
        return step_of(hooked)

    def after(center: Call) -> Call:
        def step() -> None:
            center()
            plain.step()

        return step

    return {
        BASELINE: plain.step,
        BASELINE_AGAIN: plain.step,
        TORCH_DEFAULT: default.step,
        LOOP: after(_loop(layout)),
        ATTACHED: attached("gradient"),
        ATTACHED_UPDATE: attached("update"),
        OURS: step_of(own_class(params, layout=layout, **options)),
        OURS_UPDATE: step_of(own_class(params, layout=layout, placement="update", **options)),
        **({"pytorch_optimizer + torch fused": after(_peer(params))} if peers else {}),
        **_streams(params, layout, plain),
    }


def create_layout(shapes: Iterable[ParameterShape], dtype: torch.dtype, device: str) -> WeightLayout:
    """Create parameters with gradients, and their layout."""
    generator = torch.Generator(device).manual_seed(0)
    entries = []
    for index, (shape, vectors) in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
        p.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        entries.append(Entry(str(index), p, vectors, origin="benchmark"))
    return WeightLayout(entries)


def _loop(layout: WeightLayout) -> Call:
    """Return a call that centers one gradient after another, as the usual implementations do."""
    pairs = [(p.grad.view(vectors.dims), vectors.span) for p, vectors in layout.items() if p.grad is not None]

    def center() -> None:
        for gradient, span in pairs:
            gradient.sub_(gradient.mean(span, keepdim=True))

    return center


def _peer(params: list[Tensor]) -> Call:
    """Return a call that centers with another library, which decides by shape."""
    try:
        from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
    except ModuleNotFoundError as error:
        # Older versions take one gradient per call.
        raise ValueError("--peers needs pytorch_optimizer: pip install 'pytorch-optimizer>=4.1'") from error
    return lambda: centralize_gradient([p.grad for p in params])


def _streams(params: list[Tensor], layout: WeightLayout, plain: Optimizer) -> dict[str, Call]:
    """Return calls that read and write the bytes of a step, or of the centered gradients, without computing."""
    names = [name for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if name in plain.state[params[0]]]
    device = params[0].device
    if device.type != "cpu":
        # A step reads weights and gradients, writes weights, and reads and writes each state.
        step_bytes = sum(p.nbytes for p in params) * (3 + 2 * len(names))
        gradient_bytes = 2 * sum(p.nbytes for p in layout)
        return {STREAM: copy_bytes(step_bytes, device), STREAM_GRADIENTS: copy_bytes(gradient_bytes, device)}
    if native.unavailable_reason():
        return {}
    states = [[plain.state[p][name] for p in params] for name in names]
    gradients, centered = ([p.grad for p in chosen if p.grad is not None] for chosen in (params, layout))
    return {
        STREAM: lambda: native.stream(params, gradients, states),
        STREAM_GRADIENTS: lambda: native.stream(centered, centered, []),
    }
