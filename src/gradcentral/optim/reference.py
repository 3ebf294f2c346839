"""Algorithms 1 and 2 of the paper in plain torch, one parameter at a time, for readers and for tests.

`SGD`, `Adam` and `AdamW` compute the same in one fused pass, and are tested to equal these functions over 100 steps.
Differences from the paper, all as in torch.optim: SGD has ``dampening`` in place of the paper's factor 1 − β, and its
momentum starts with the first gradient, undamped; weight decay and AMSGrad are supported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral.projection import center
from gradcentral.weight_vectors import WeightVectors

__all__ = ["AdamState", "adam_step", "sgd_step"]


def sgd_step(
    w: Tensor,
    g: Tensor,
    m: Tensor | None,
    vectors: WeightVectors | None,
    placement: str,
    *,
    strength: float = 1.0,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Take one step of SGD with momentum and Gradient Centralization (algorithm 1).

    Args:
        w, g: the weights and their gradient ∂L/∂w, of one shape.
        m: the momentum buffer, None before the first step.
        vectors: which elements form one weight vector; None for a parameter that is not centered.
        placement: ``"gradient"``, ``"regularized"`` or ``"update"``.
        strength: s of P_s = I − s·eeᵀ, in place of P.

    Returns:
        The new weights and momentum buffer; the arguments are unchanged.
    """
    d = _direction(g, weight_decay, w, vectors, placement, strength)
    if momentum != 0:
        m = d if m is None else momentum * m + (1 - dampening) * d
        d = d + momentum * m if nesterov else m
    return w + _update(-lr * d, vectors, placement, strength), m


class AdamState(NamedTuple):
    """The moments m and v, the largest v so far (for AMSGrad), and the number of steps t."""

    m: Tensor
    v: Tensor
    largest_v: Tensor
    t: int = 0

    @classmethod
    def zero(cls, w: Tensor) -> AdamState:
        """Return the state before the first step."""
        return cls(torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w))


def adam_step(
    w: Tensor,
    g: Tensor,
    state: AdamState,
    vectors: WeightVectors | None,
    placement: str,
    *,
    strength: float = 1.0,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> tuple[Tensor, AdamState]:
    """Take one step of Adam, or AdamW if ``decoupled``, with Gradient Centralization (algorithm 2).

    Arguments and results are as in `sgd_step`, with an `AdamState` in place of the momentum buffer.
    """
    d = _direction(g, 0.0 if decoupled else weight_decay, w, vectors, placement, strength)
    beta1, beta2 = betas
    t = state.t + 1
    m = beta1 * state.m + (1 - beta1) * d
    v = beta2 * state.v + (1 - beta2) * d.square()
    largest_v = torch.maximum(state.largest_v, v) if amsgrad else v
    m_hat, v_hat = m / (1 - beta1**t), largest_v / (1 - beta2**t)
    change = -lr * m_hat / (v_hat.sqrt() + eps) - _decay(lr * weight_decay if decoupled else 0.0, w)
    return w + _update(change, vectors, placement, strength), AdamState(m, v, largest_v, t)


def _decay(factor: float, w: Tensor) -> Tensor | float:
    """Return factor · w; without weight decay 0, where an infinite weight would give NaN."""
    return 0.0 if factor == 0 else factor * w


def _direction(
    g: Tensor, l2: float, w: Tensor, vectors: WeightVectors | None, placement: str, strength: float
) -> Tensor:
    """Return P_s g + λw under placement "gradient", P_s(g + λw) under "regularized", else g + λw."""
    if vectors is not None and placement == "gradient":
        g = center(g, vectors, strength)
    d = g + _decay(l2, w)
    return center(d, vectors, strength) if vectors is not None and placement == "regularized" else d


def _update(change: Tensor, vectors: WeightVectors | None, placement: str, strength: float) -> Tensor:
    """Return P_s Δw under placement "update", else Δw."""
    return center(change, vectors, strength) if vectors is not None and placement == "update" else change
