"""The proof that a run did what its arm says, taken from the gradients and weights of real steps."""

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
from gradcentral.weight_vectors import WeightVectors

__all__ = ["ARMS", "NONE", "CheckedArm"]

NONE = "none"
ARMS = (NONE, *PLACEMENTS)

# In units of the dtype's eps: the mean is summed, subtracted and stored, each with one rounding or two.
ROUNDING = 8


class CheckedArm:
    """Attaches what the arm says to an optimizer, and checks steps of it.

    Put `watch` before the optimizer's step and `verify` after it.

    Args:
        arm: ``"none"``, ``"gradient"`` or ``"update"``.
        model: whose weights are trained.
        optimizer: a plain one.

    Raises:
        ArmError: the optimizer centers already.
        ValueError: nothing to center in this model (from `gradcentral.centralize`).
    """

    def __init__(self, arm: str, model: nn.Module, optimizer: Optimizer) -> None:
        if centering_of(optimizer):
            raise ArmError(
                "the task's optimizer centers already: give a plain one, such as torch.optim's; the arms add GC"
            )
        self.arm = arm
        self._optimizer = optimizer
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._watching = False
        # Registered before and after the arm's own hooks, so that it sees the weights that the plain step made, and
        # the gradients that the step was given.
        optimizer.register_step_post_hook(self._keep_moved)
        self.handle = None if arm == NONE else centralize(optimizer, model, placement=arm)
        self._layout = weight_layout(model) if self.handle is None else self.handle.layout
        optimizer.register_step_pre_hook(self._keep_seen)
        self._drift = Drift(self._layout.items())

    def watch(self) -> None:
        """Remember the raw gradients and the weights before a step."""
        self._raw = {p: p.grad.detach().clone() for p in self._parameters() if p.grad is not None}
        self._weights = {p: p.detach().clone() for p in self._raw}
        self._seen: dict[Tensor, Tensor] = {}
        self._moved: dict[Tensor, Tensor] = {}
        self._watching = True

    def effect(self) -> Effect:
        """What centering does, or would do, to the raw gradients of all parameters as one vector."""
        return combine_effects(effects([(raw, self._layout.get(p)) for p, raw in self._raw.items()]))

    def drift(self) -> float:
        """‖eᵀ(w − w⁰)‖ over all weight vectors since the run began."""
        return self._drift.total()

    def verify(self) -> None:
        """Check the step that was watched; without a step (AMP skips it on overflow) there is nothing to check.

        Raises:
            ArmError: naming the arm, the parameter and what was found.
        """
        self._watching = False
        self._check_handles()
        if not self._seen or not all(_is_finite(gradient) for gradient in self._raw.values()):
            return
        for parameter, raw in self._raw.items():
            centered = parameter in self._layout
            if self.arm == "gradient" and centered:
                self._check_centered(parameter, raw)
            elif not torch.equal(_dense(raw), _dense(self._seen[parameter])):
                self._fail(parameter, "its gradient was changed before the optimizer saw it")
            if self.arm == "update" and centered:
                self._check_mean_kept(parameter)

    def _check_handles(self) -> None:
        handles = attached(self._optimizer)
        wanted = [] if self.handle is None else [self.handle]
        if handles != wanted:
            found = ", ".join(map(repr, handles)) or "nothing"
            raise ArmError(f"arm {self.arm!r} was tampered with: attached to the optimizer is {found}")

    def _check_centered(self, parameter: Tensor, raw: Tensor) -> None:
        seen, vectors = _wide(self._seen[parameter]), self._vectors(parameter)
        rms = unit_means(_wide(raw).abs().square(), vectors).sqrt()
        allowed = _tolerance(raw.dtype) * rms + _smallest(raw.dtype)
        mean = unit_means(seen, vectors).abs()
        if bool((mean > allowed).any()):
            worst = float((mean / rms.clamp_min(_smallest(raw.dtype))).max())
            self._fail(parameter, f"a weight vector's gradient has a mean of {worst:.1e} of its rms, not zero")
        # No element is larger than √M times the rms.
        error = unit_means((seen - center(_wide(raw), vectors)).abs().square(), vectors).sqrt()
        if bool((error > allowed).any()):
            self._fail(parameter, "its centered gradient is not Φ of the raw one")

    def _check_mean_kept(self, parameter: Tensor) -> None:
        vectors = self._vectors(parameter)
        states = [_wide(w) for w in (self._weights[parameter], self._moved[parameter], parameter.detach())]
        if not all(_is_finite(w) for w in states):
            return
        size = torch.stack([unit_means(w.abs().square(), vectors).sqrt() for w in states]).amax(0)
        drift = (unit_means(states[2], vectors) - unit_means(states[0], vectors)).abs()
        if bool((drift > _tolerance(parameter.dtype) * size + _smallest(parameter.dtype)).any()):
            self._fail(parameter, f"the step moved the mean of a weight vector by {float(drift.max()):.1e}")

    def _fail(self, parameter: Tensor, found: str) -> None:
        name = self._names.get(parameter, "a parameter that is not the model's")  # type: ignore[call-overload]
        raise ArmError(f"arm {self.arm!r} did not do what it says: {name}: {found}")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _vectors(self, parameter: Tensor) -> WeightVectors:
        return self._layout[parameter]

    def _keep_seen(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watching:
            self._seen = {p: p.grad.detach().clone() for p in self._raw if p.grad is not None}

    def _keep_moved(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watching and self.arm == "update":
            self._moved = {p: p.detach().clone() for p in self._raw}


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
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
    """Below this, numbers of the dtype have a fixed spacing, or are zero."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps) * ROUNDING
