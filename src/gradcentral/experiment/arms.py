"""The arms of a comparison, and the check that a run trains as its arm requires."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.attach import attached, centering_of, centralize
from gradcentral.diagnostics.centering_effect import Effect, combine_effects, effects
from gradcentral.diagnostics.drift import Drift
from gradcentral.experiment.errors import ArmError
from gradcentral.layout import weight_layout
from gradcentral.projection import center, unit_means
from gradcentral.targets import PLACEMENTS

__all__ = ["ARMS", "NONE", "CheckedArm"]

NONE = "none"
ARMS = (NONE, *PLACEMENTS)

# In units of the dtype's eps: the mean is summed, subtracted and stored, each with one or two roundings.
ROUNDING = 8


class CheckedArm:
    """Attaches GC to an optimizer as the arm requires, and checks the gradients and weights of real steps.

    Call `watch` before the optimizer's step and `verify` after it.

    Args:
        arm: ``"none"``, ``"gradient"`` or ``"update"``.
        model: the model being trained.
        optimizer: an optimizer without GC.

    Raises:
        ArmError: the optimizer already centers gradients.
        ValueError: the model has nothing to center (from `gradcentral.centralize`).
    """

    def __init__(self, arm: str, model: nn.Module, optimizer: Optimizer) -> None:
        if centering_of(optimizer):
            raise ArmError(
                "the task's optimizer already centers gradients: use a plain one, such as torch.optim's; "
                "the arms attach GC"
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
        self._drift = Drift(self._layout.items())

    def watch(self) -> None:
        """Keep copies of the raw gradients and the weights before a step."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._raw: dict[Tensor, Tensor] = {p: p.grad.detach().clone() for p in parameters if p.grad is not None}
        self._weights = {p: p.detach().clone() for p in self._raw}
        self._received: dict[Tensor, Tensor] = {}
        self._after_plain_step: dict[Tensor, Tensor] = {}
        self._watching = True

    def effect(self) -> Effect:
        """Return what centering does, or would do, to the raw gradients of all parameters as one vector."""
        return combine_effects(effects([(raw, self._layout.get(p)) for p, raw in self._raw.items()]))

    def drift(self) -> float:
        """Return ‖eᵀ(w − w⁰)‖ over all weight vectors since the start of the run."""
        return self._drift.total()

    def verify(self) -> None:
        """Check the watched step. If it was skipped (AMP does so on overflow) or overflowed, there is nothing to check.

        Raises:
            ArmError: naming the arm, the parameter and what was found.
        """
        self._watching = False
        self._check_handles()
        if not self._received or not all(_is_finite(gradient) for gradient in self._raw.values()):
            return
        for parameter, raw in self._raw.items():
            centered = parameter in self._layout
            if self.arm == "gradient" and centered:
                self._check_gradient_centered(parameter, raw)
            elif not torch.equal(_dense(raw), _dense(self._received[parameter])):
                self._fail(parameter, "its gradient was changed before the optimizer received it")
            if self.arm == "update" and centered:
                self._check_mean_unchanged(parameter)

    def _check_handles(self) -> None:
        handles = attached(self._optimizer)
        expected = [] if self.handle is None else [self.handle]
        if handles != expected:
            found = ", ".join(map(repr, handles)) or "nothing"
            raise ArmError(f"arm {self.arm!r} was tampered with: attached to the optimizer is {found}")

    def _check_gradient_centered(self, parameter: Tensor, raw: Tensor) -> None:
        received, vectors = _wide(self._received[parameter]), self._layout[parameter]
        rms = unit_means(_wide(raw).abs().square(), vectors).sqrt()
        allowed = _tolerance(raw.dtype) * rms + _smallest(raw.dtype)
        mean = unit_means(received, vectors).abs()
        if bool((mean > allowed).any()):
            worst = float((mean / rms.clamp_min(_smallest(raw.dtype))).max())
            self._fail(parameter, f"a weight vector's gradient has a mean of {worst:.1e} of its rms instead of zero")
        # Compare root mean squares: relative to the rms, a single element may be as large as √M.
        error = unit_means((received - center(_wide(raw), vectors)).abs().square(), vectors).sqrt()
        if bool((error > allowed).any()):
            self._fail(parameter, "its centered gradient is not Φ of the raw one")

    def _check_mean_unchanged(self, parameter: Tensor) -> None:
        vectors = self._layout[parameter]
        before, plain, after = map(_wide, (self._weights[parameter], self._after_plain_step[parameter], parameter))
        if not all(_is_finite(w) for w in (before, plain, after)):
            return
        # The plain step may have been much larger than both, and its rounding remains.
        size = torch.stack([unit_means(w.abs().square(), vectors).sqrt() for w in (before, plain, after)]).amax(0)
        drift = (unit_means(after, vectors) - unit_means(before, vectors)).abs()
        if bool((drift > _tolerance(parameter.dtype) * size + _smallest(parameter.dtype)).any()):
            self._fail(parameter, f"the step moved the mean of a weight vector by {float(drift.max()):.1e}")

    def _fail(self, parameter: Tensor, found: str) -> None:
        name = self._names.get(parameter, "a parameter outside the model")  # type: ignore[call-overload]
        raise ArmError(f"the run did not train as arm {self.arm!r} requires: {name}: {found}")

    def _keep_received(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watching:
            self._received = {p: p.grad.detach().clone() for p in self._raw if p.grad is not None}

    def _keep_plain_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watching and self.arm == "update":
            self._after_plain_step = {p: p.detach().clone() for p in self._raw}


def _wide(tensor: Tensor) -> Tensor:
    """Convert to double precision, on the CPU if the device lacks it."""
    tensor = tensor.detach()
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return _dense(tensor).to(torch.complex128 if tensor.is_complex() else torch.float64)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_dense(tensor)).all())


def _tolerance(dtype: torch.dtype) -> float:
    return ROUNDING * torch.finfo(dtype).eps


def _smallest(dtype: torch.dtype) -> float:
    """Return the spacing of subnormal numbers, which a relative tolerance does not cover."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps) * ROUNDING
