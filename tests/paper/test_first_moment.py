"""Centering Adam's first moment instead of the gradient, as described in docs/theory.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradcentral import center, centralize
from gradcentral.experiment import Task, load_task

BETAS, EPS = (0.9, 0.999), 1e-8


class Moments(NamedTuple):
    """Adam's moments of a sequence of gradients."""

    m: Tensor
    v: Tensor

    def update(self, g: Tensor) -> None:
        self.m.lerp_(g, 1 - BETAS[0])
        self.v.lerp_(g.square(), 1 - BETAS[1])

    def direction(self, m: Tensor, t: int) -> Tensor:
        """Return the direction of Adam's step t with m in place of the first moment."""
        return m / (1 - BETAS[0] ** t) / ((self.v / (1 - BETAS[1] ** t)).sqrt() + EPS)


def test_centering_the_first_moment_differs_from_centering_the_gradient_in_v_only() -> None:
    task = load_task("digits")
    assert isinstance(task, Task)
    torch.manual_seed(0)
    model = task.model()
    x, y = task.train.tensors
    optimizer = task.optimizers["adamw"](model.parameters())
    layout = centralize(optimizer, model).layout
    raw, centered = ({w: Moments(torch.zeros_like(w), torch.zeros_like(w)) for w in layout} for _ in range(2))
    order = torch.Generator().manual_seed(0)
    batches = [i for _ in range(10) for i in torch.randperm(len(x), generator=order).split(32)]
    for i in batches:
        optimizer.zero_grad()
        task.loss(model(x[i]), y[i]).backward()
        for w, vectors in layout.items():
            assert w.grad is not None
            raw[w].update(w.grad)
            centered[w].update(center(w.grad, vectors))
        optimizer.step()
    largest = {"first moment": 0.0, "gradient": 0.0}
    for w, vectors in layout.items():
        moments, expected = raw[w], centered[w]
        torch.testing.assert_close(expected.v, optimizer.state[w]["exp_avg_sq"])
        m = center(moments.m, vectors)
        assert float((m - expected.m).norm() / expected.m.norm()) < 1e-6
        assert 1.1 < float((moments.v.sum() / expected.v.sum()).sqrt()) < 2.5
        steps = {"first moment": moments.direction(m, len(batches))}
        steps["gradient"] = expected.direction(expected.m, len(batches))
        largest = {name: max(longest, float(steps[name].abs().max())) for name, longest in largest.items()}
        if layout.names[w] == "4.weight":
            silent = moments.v == 0  # the gradient of these weights has always been zero
            assert 0.01 < float(silent.float().mean()) < 0.1
            assert float(steps["first moment"][silent].abs().min()) > 0
    assert largest["gradient"] < 1  # in learning rates
    assert largest["first moment"] > 1000
