"""Adam and AdamW with Gradient Centralization (algorithm 2 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradcentral.kernels import triton
from gradcentral.kernels.forms import Coefficients, UpdateRule, is_counter
from gradcentral.optim.base import CentralizedOptimizer

__all__ = ["Adam", "AdamW"]


class _CentralizedAdam(CentralizedOptimizer):
    """Common base of Adam and AdamW, which differ only in whether weight decay is L2 or decoupled."""

    def _update_rule(self, group: dict[str, Any]) -> UpdateRule:
        return UpdateRule.AMSGRAD if group["amsgrad"] else UpdateRule.ADAM

    def _remedy_for_sparse(self, group: dict[str, Any]) -> str:
        return "update it with torch.optim.SparseAdam"

    def _coefficients(self, group: dict[str, Any], lr: float, scale: float, strength: float) -> Coefficients:
        beta1, beta2 = group["betas"]
        decoupled = group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
        weight_decay = float(group["weight_decay"])
        return Coefficients(
            lr=lr,
            l2=0.0 if decoupled else weight_decay,
            decay=lr * weight_decay if decoupled else 0.0,
            beta1=float(beta1),
            beta2=float(beta2),
            epsilon=float(group["eps"]),
            scale=scale,
            strength=strength,
        )

    def _create_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=_counter_dtype(p), device=p.device)
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        elif triton.serves(p) and not is_counter(state["step"], p.device, (torch.float32,)):
            state["step"] = state["step"].to(p.device, torch.float32)  # a checkpoint of torch's unfused optimizer
        return state


def _counter_dtype(p: Tensor) -> torch.dtype:
    """Return the type of torch's step counters: those of its fused CUDA optimizers are always float32."""
    if triton.serves(p):
        return torch.float32
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Adam(_CentralizedAdam, torch.optim.Adam):
    """``torch.optim.Adam`` with Gradient Centralization, in one fused step.

    Takes every argument of ``torch.optim.Adam`` and those of `CentralizedOptimizer`; ``state_dict`` is torch's own and
    loads in both directions.

    Source: Yong et al. 2020, algorithm 2; placement ``"update"`` centers after the adaptive term, as the authors
    recommend.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = gradcentral.Adam(model.parameters(), lr=1e-3, model=model)
    """


class AdamW(_CentralizedAdam, torch.optim.AdamW):
    """``torch.optim.AdamW`` with Gradient Centralization, in one fused step.

    Takes every argument of ``torch.optim.AdamW`` and those of `CentralizedOptimizer`; ``state_dict`` is torch's own and
    loads in both directions. The decoupled weight decay is part of the change that placement ``"update"`` centers.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = gradcentral.AdamW(model, lr=1e-3, placement="update")
    """
