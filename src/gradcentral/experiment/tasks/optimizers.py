"""The optimizers of the built-in tasks, at learning rates and weight decays that a search without GC found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

__all__ = ["OPTIMIZERS", "PAPER_RATES", "Lion", "Rates", "optimizers", "tuned", "warm_up_then_cosine"]

Rates = Mapping[str, float]
"""The arguments ``lr`` and ``weight_decay`` of an optimizer."""


class Lion(Optimizer):
    """Lion: the sign of an average of gradients, with decoupled weight decay.

    Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters; a closure is not supported.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("this Lion takes no closure: call backward() before step()")
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(lr * average.lerp(parameter.grad, 1 - beta1).sign_())
                average.lerp_(parameter.grad, 1 - beta2)


PAPER_RATES: dict[str, Rates] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-3},
    "lion": {"lr": 1e-4, "weight_decay": 1.0},
}
"""The rates of the paper on CIFAR-100, its tables 1 and 2; Lion is younger, so its rates are usual ones."""

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": partial(SGD, momentum=0.9), "adamw": AdamW, "lion": Lion}


@functools.cache
def _searched() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = json.loads(
        Path(__file__).with_name("tuned.json").read_text(encoding="utf-8")
    )
    return found


def tuned(task: str) -> dict[str, Rates]:
    """Return the rates of each optimizer that were best for a task without GC.

    ``tuned.json`` is written by ``python benchmarks/evidence.py search``, whose seeds the evidence does not use.
    """
    return dict(_searched()[task])


def optimizers(rates: Mapping[str, Rates]) -> dict[str, Callable[..., Optimizer]]:
    """Return factories for a `Task`, each with its rates."""
    return {name: partial(OPTIMIZERS[name], **arguments) for name, arguments in rates.items()}


def warm_up_then_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Warm up over a tenth of the steps, then decay to zero: the usual schedule of transformers."""
    warm = max(1, steps // 10)
    up = LinearLR(optimizer, start_factor=1 / warm, total_iters=warm)
    return SequentialLR(optimizer, [up, CosineAnnealingLR(optimizer, T_max=max(1, steps - warm))], milestones=[warm])
