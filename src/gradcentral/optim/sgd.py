"""SGD with momentum and Gradient Centralization (algorithm 1 of the paper)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gradcentral.kernels.forms import Coefficients, UpdateRule
from gradcentral.local_shard import local, with_local
from gradcentral.optim.base import CentralizedOptimizer

__all__ = ["SGD"]


class SGD(CentralizedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with Gradient Centralization, in one fused step.

    Takes every argument of ``torch.optim.SGD`` and those of `CentralizedOptimizer`; ``state_dict`` is torch's own and
    loads in both directions.

    Source: Yong et al. 2020, algorithm 1. With placement ``"update"`` and weight decay it centers g + λw, as the
    authors' code does.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = gradcentral.SGD(model, lr=0.1, momentum=0.9)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def _update_rule(self, group: dict[str, Any]) -> UpdateRule:
        return UpdateRule.MOMENTUM if group["momentum"] != 0 else UpdateRule.SGD

    def _remedy_for_sparse(self, group: dict[str, Any]) -> str:
        return "put the parameter in a group with weight_decay=0" if group["weight_decay"] != 0 else ""

    _torch_reads_found_inf = False

    def _torch_step(self) -> None:
        """Take torch's step without ``fused=True``, on unscaled gradients.

        In torch 2.11 to 2.13 the fused step loses weights and momentum in half precision on the CPU, and a first step
        that a GradScaler skips leaves momentum buffers uninitialized.
        """
        scaler = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        scale: Tensor | None = scaler.get("grad_scale")
        fused_options = [group["fused"] for group in self.param_groups]
        params = [] if scale is None else [p for group in self.param_groups for p in group["params"]]
        scaled = {p: p.grad for p in params if p.grad is not None}
        try:
            for group in self.param_groups:
                if group["fused"]:
                    group["fused"] = None
            for name in scaler:
                setattr(self, name, None)
            for p, gradient in scaled.items():
                held = local(gradient)
                p.grad = with_local(gradient, held / cast("Tensor", scale).to(held.device))
            super()._torch_step()
        finally:
            for group, fused in zip(self.param_groups, fused_options, strict=True):
                group["fused"] = fused
            for name, value in scaler.items():
                setattr(self, name, value)
            for p, gradient in scaled.items():
                p.grad = gradient

    def _coefficients(self, group: dict[str, Any], lr: float, scale: float, strength: float) -> Coefficients:
        return Coefficients(
            lr=lr,
            l2=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            keep=1 - float(group["dampening"]),
            nesterov=float(group["nesterov"]),
            scale=scale,
            strength=strength,
        )

    def _create_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if group["momentum"] == 0:
            return {}
        state: dict[str, Any] = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            self._fresh.add(p)
        return state
