"""Equation 3 of the paper: the properties of the projection P."""

from __future__ import annotations

from functools import partial

from torch import nn

from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import Batch, Loss, centered_layout, gradients_of
from gradcentral.paper.measurement import CENTERING, Measurement, measure_equation
from gradcentral.paper.rows import along_e, double_rows, relative
from gradcentral.projection import center

__all__ = ["projection_identities"]


def projection_identities(
    model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout | None = None
) -> list[Measurement]:
    """P² = P = Pᵀ and eᵀP∇L = 0, for the gradient of each weight vector.

    Args:
        model: left unchanged; it runs in its current mode.
        loss: ``loss(output, target)`` -> scalar.
        batch: ``(input, target)``, or a mapping, used as ``model(**batch)`` and ``loss(output, batch)``.
        layout: the weight vectors to measure; by default ``weight_layout(model)``.

    Returns:
        One `Measurement` per identity. Φ is computed in the gradients' dtype, its deviation in double precision.

    Raises:
        ValueError: nothing is centered.

    Source: Yong et al. 2020, eq. 3.

    Examples:
        >>> import torch
        >>> model, batch = torch.nn.Linear(5, 2), (torch.randn(8, 5), torch.randn(8, 2))
        >>> [m.holds for m in projection_identities(model, torch.nn.functional.mse_loss, batch)]
        [True, True, True]
    """
    layout = centered_layout(model, layout)
    idempotent, symmetric, orthogonal = {}, {}, {}
    for name, w, g, vectors in gradients_of(model, loss, batch, layout):
        once = center(g, vectors)
        rows, centered, twice = (double_rows(v, vectors) for v in (g, once, center(once, vectors)))
        # ⟨Φ(g), w⟩ = ⟨g, Φ(w)⟩, with the weights as the second vector of the inner product.
        weights, crossed = double_rows(w, vectors), double_rows(center(w.detach(), vectors), vectors)
        difference = (centered.conj() * weights).sum(1) - (rows.conj() * crossed).sum(1)
        length = rows.norm(dim=1)
        idempotent[name] = relative((twice - centered).norm(dim=1), length)
        symmetric[name] = relative(difference.abs(), length * weights.norm(dim=1))
        orthogonal[name] = relative(along_e(centered), length)
    equation = partial(measure_equation, "eq. 3", parameters=layout)
    inner_products = "|⟨Φ(g),w⟩ − ⟨g,Φ(w)⟩| / ‖g‖‖w‖"
    return [
        equation("P² = P: centering is idempotent", "‖Φ(Φ(g)) − Φ(g)‖ / ‖g‖", idempotent, CENTERING),
        equation("P = Pᵀ: the projection is orthogonal", inner_products, symmetric, 2 * CENTERING),
        equation("eᵀP∇L = 0: a centered gradient has mean zero", "|eᵀΦ(g)| / ‖g‖", orthogonal, CENTERING),
    ]
