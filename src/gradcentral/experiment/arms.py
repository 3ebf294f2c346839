"""The arms of a comparison, and the check that a run trains as its arm requires."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.attach import attached, centering_of, centralize
from gradcentral.diagnostics.centering_effect import Effect, combine_effects, effects
from gradcentral.diagnostics.drift import Drift
from gradcentral.experiment.errors import ArmError
from gradcentral.groups import OPTION
from gradcentral.layout import weight_layout
from gradcentral.projection import center_regularized, unit_means
from gradcentral.weight_decay import l2_of
from gradcentral.weight_vectors import WeightVectors

__all__ = ["ARMS", "DEFAULT_ARMS", "NONE", "REGULARIZED", "CheckedArm"]

NONE, REGULARIZED = "none", "regularized"
ARMS = (NONE, "gradient", REGULARIZED, "update")
DEFAULT_ARMS = (NONE, "gradient", "update")
"""The arms by default: without L2 weight decay, "regularized" would repeat the runs of "gradient"."""

# In units of the dtype's eps. The mean is summed, subtracted and stored, each with one or two rounding errors.
ROUNDING = 8


class CheckedArm:
    """An arm attached to a plain optimizer, with a check of the gradients and weights of real steps.

    Call `watch` before the optimizer's step and `verify` after it; `verify` raises an `ArmError` if the check fails.
    """

    def __init__(self, arm: str, model: nn.Module, optimizer: Optimizer) -> None:
        if centering_of(optimizer):
            raise ArmError("the task's optimizer already centers gradients: use a plain one; the arms attach GC")
        if any(not isinstance(group.get(OPTION), bool | None) for group in optimizer.param_groups):
            raise ArmError(
                'a parameter group of the task\'s optimizer has a strength, which no arm compares: use "centralize": '
                "False to leave the group out, or omit the key"
            )
        self.arm = arm
        self._optimizer = optimizer
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._watching = False
        # Hooks run in the order of registration. The post-hook precedes the arm's own, so it sees the weights of the
        # plain step; the pre-hook follows it, so it sees the gradients that the step receives.
        optimizer.register_step_post_hook(self._keep_plain_step)
        self.handle = None if arm == NONE else centralize(optimizer, model, placement=arm)
        self._layout = weight_layout(model) if self.handle is None else self.handle.layout
        optimizer.register_step_pre_hook(self._keep_received)
        self.drift = Drift(self._layout.items())

    def watch(self) -> Effect:
        """Keep copies of weights and raw gradients; return the effect of Φ on all gradients taken as one vector."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._raw = _copies(parameters, gradients=True)
        self._weights = _copies(parameters)
        self._received: dict[Tensor, Tensor] = {}
        self._after_plain_step: dict[Tensor, Tensor] = {}
        self._watching = True
        return combine_effects(effects([(raw, self._layout.get(p)) for p, raw in self._raw.items()]))

    def verify(self) -> None:
        """Check the watched step, unless a gradient overflowed or AMP skipped the step."""
        self._watching = False
        handles = attached(self._optimizer)
        if handles != ([] if self.handle is None else [self.handle]):
            found = ", ".join(map(repr, handles)) or "nothing"
            raise ArmError(f"arm {self.arm!r} was changed during the run: {found} is attached to the optimizer")
        if not self._received or not all(_is_finite(gradient) for gradient in self._raw.values()):
            return
        excluded = {p for targets in centering_of(self._optimizer) for p in targets.excluded}
        for parameter, raw in self._raw.items():
            centered = parameter in self._layout and parameter not in excluded
            if self.arm in ("gradient", REGULARIZED) and centered:
                self._check_gradient_centered(parameter)
            elif not torch.equal(_wide(raw), _wide(self._received[parameter])):
                self._fail(parameter, "its gradient was changed before the optimizer received it")
            if self.arm == "update" and centered:
                self._check_mean_unchanged(parameter)

    def _check_gradient_centered(self, parameter: Tensor) -> None:
        vectors, dtype = self._layout[parameter], self._raw[parameter].dtype
        raw, received, weights = map(_wide, (self._raw[parameter], self._received[parameter], self._weights[parameter]))
        rms, total, what = _rms(raw, vectors), received, "a weight vector's gradient"
        # λ of the weight decay that is centered together with the gradient.
        l2: float | Tensor = l2_of(self._optimizer).of(parameter) if self.arm == REGULARIZED else 0.0
        if l2 != 0:  # 0 times an infinite weight would be NaN
            decay = l2 * weights
            rms, total = rms + _rms(decay, vectors), received + decay
            what += " with its weight decay"
        mean, allowed = unit_means(total, vectors).abs(), _allowed(rms, dtype)
        if bool((mean > allowed).any()):
            worst = float((mean / rms).nan_to_num().max())
            self._fail(parameter, f"{what} has a mean of {worst:.1e} of its rms instead of zero")
        # Compare root mean squares, because a single element may be as large as √M times the rms.
        if bool((_rms(received - center_regularized(raw, weights, l2, vectors), vectors) > allowed).any()):
            self._fail(parameter, "its centered gradient is not Φ of the raw one")

    def _check_mean_unchanged(self, parameter: Tensor) -> None:
        vectors = self._layout[parameter]
        before, plain, after = map(_wide, (self._weights[parameter], self._after_plain_step[parameter], parameter))
        if not all(_is_finite(w) for w in (before, plain, after)):
            return
        # The result of the plain step may be much larger than both, and its rounding error remains.
        size = torch.stack([_rms(w, vectors) for w in (before, plain, after)]).amax(0)
        drift = (unit_means(after, vectors) - unit_means(before, vectors)).abs()
        if bool((drift > _allowed(size, parameter.dtype)).any()):
            self._fail(parameter, f"the step moved the mean of a weight vector by {float(drift.max()):.1e}")

    def _fail(self, parameter: Tensor, found: str) -> None:
        name = self._names.get(parameter, "a parameter outside the model")  # type: ignore[call-overload]
        raise ArmError(f"the run did not train as arm {self.arm!r} requires: {name}: {found}")

    def _keep_received(self, *_: Any) -> None:
        if self._watching:
            self._received = _copies(self._raw, gradients=True)

    def _keep_plain_step(self, *_: Any) -> None:
        if self._watching and self.arm == "update":
            self._after_plain_step = _copies(self._raw)


def _copies(parameters: Iterable[Tensor], *, gradients: bool = False) -> dict[Tensor, Tensor]:
    sources = ((p, p.grad if gradients else p) for p in parameters)
    return {p: source.detach().clone() for p, source in sources if source is not None}


def _wide(tensor: Tensor) -> Tensor:
    """Convert to a dense tensor in double precision, on the CPU if the device lacks it."""
    tensor = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_wide(tensor)).all())


def _rms(tensor: Tensor, vectors: WeightVectors) -> Tensor:
    return unit_means(tensor.abs().square(), vectors).sqrt()


def _allowed(rms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the allowed rounding error; ``tiny`` covers the spacing of subnormal numbers, which eps does not."""
    info = torch.finfo(dtype)
    return ROUNDING * info.eps * (rms + info.tiny)
