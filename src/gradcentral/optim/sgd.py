"""SGD with momentum and Gradient Centralization (algorithm 1 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels.forms import Coefficients, UpdateRule
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

    def _coefficients(self, group: dict[str, Any], lr: float) -> Coefficients:
        return Coefficients(
            lr=lr,
            l2=group["weight_decay"],
            momentum=group["momentum"],
            keep=1 - group["dampening"],
            nesterov=float(group["nesterov"]),
        )

    def _create_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if group["momentum"] == 0:
            return {}
        state: dict[str, Any] = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            self._fresh.add(p)
        return state
