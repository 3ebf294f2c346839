"""Theorem 4.2: centering shortens the gradient and its derivative, so the loss and its gradient are smoother."""

from __future__ import annotations

import math

import torch
from torch import nn

from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import Batch, Loss, ParameterGradient, centered_layout, gradients_of
from gradcentral.paper.hessian import hessian_matrix, projected_norm, top_eigenvalue
from gradcentral.paper.measurement import CENTERING, Measurement, coarsest_eps, largest, measure_equation
from gradcentral.paper.rows import along_e, as_rows, double_rows, relative
from gradcentral.projection import center, projection_matrix

__all__ = ["THEOREM_4_2", "gradient_lipschitzness", "loss_lipschitzness"]

THEOREM_4_2 = "the gradient changes no faster within the hyperplane"

# Rounding of products with ∇²L, in eps of ‖∇²L‖: up to 4 eps were measured over 2000 small networks.
_CURVATURE = 16


def loss_lipschitzness(
    model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout | None = None
) -> list[Measurement]:
    """‖Φ(∇L)‖ ≤ ‖∇L‖ for each weight vector; the difference is exactly the component along e.

    The arguments and errors are those of `projection_identities`.

    Source: Yong et al. 2020, theorem 4.2, the first part of eq. 6, and its proof.

    Examples:
        >>> model, batch = nn.Linear(5, 2), (torch.randn(8, 5), torch.randn(8, 2))
        >>> [m.holds for m in loss_lipschitzness(model, nn.functional.mse_loss, batch)]
        [True, True]
    """
    layout = centered_layout(model, layout)
    pythagoras, ratios = {}, {}
    shortened = whole = 0.0
    for name, _, g, vectors in gradients_of(model, loss, batch, layout):
        rows = double_rows(g, vectors)
        length, centered = rows.norm(dim=1), double_rows(center(g, vectors), vectors).norm(dim=1)
        pythagoras[name] = relative((centered**2 - (length**2 - along_e(rows) ** 2)).abs(), length**2)
        ratios[name] = relative(centered, length)
        shortened, whole = math.hypot(shortened, centered.norm()), math.hypot(whole, length.norm())
    value, where = largest(ratios)
    eps, dtype = coarsest_eps(layout)
    shorter = "the loss changes no faster within the hyperplane: a centered gradient is not longer"
    bound, allowance = 1 + CENTERING * eps, f"1 + {CENTERING} eps({dtype})"
    where = f"{where}; all together {shortened / (whole or 1):.3f}"
    removed, formula = "centering removes exactly the component along e", "|‖Φ(∇L)‖² − (‖∇L‖² − (eᵀ∇L)²)| / ‖∇L‖²"
    return [
        Measurement("theorem 4.2", shorter, "‖Φ(∇L)‖ / ‖∇L‖", value, bound, allowance, where),
        measure_equation("theorem 4.2, proof", removed, formula, pythagoras, 2 * CENTERING, layout),
    ]


def gradient_lipschitzness(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    layout: WeightLayout | None = None,
    *,
    largest_fan_in: int = 512,
    tolerance: float = 1e-3,
) -> list[Measurement]:
    """‖P∇²L‖ ≤ ‖∇²L‖ in the spectral norm.

    The theorem is about one weight vector. It is measured exactly for the longest gradient of each parameter, and by
    Lanczos iteration for all trainable parameters together, where P is the identity on those that are not centered.

    Args:
        model, loss, batch, layout: as in `projection_identities`.
        largest_fan_in: skip parameters with a larger fan-in M in the exact part, which takes M products with ∇²L per
            parameter. If every fan-in is larger, there is no exact part.
        tolerance: the tolerance of the iteration (see `top_eigenvalue`).

    Returns:
        The exact ratio, if any, then ‖P∇²L‖ and ‖P∇²LP‖ of the whole network with the bound ‖∇²L‖.

    Raises:
        ValueError: no trainable parameter is centered.
        NotImplementedError: torch cannot differentiate a part of the model twice.

    Source: Yong et al. 2020, theorem 4.2, the second part of eq. 6: ‖∇Φ(∇L)‖ ≤ ‖∇²L‖.

    Examples:
        >>> model, batch = nn.Linear(5, 2), (torch.randn(8, 5), torch.randn(8, 2))
        >>> [m.holds for m in gradient_lipschitzness(model, nn.functional.mse_loss, batch)]
        [True, True, True]
    """
    layout = centered_layout(model, layout)
    gradients = [g for g in gradients_of(model, loss, batch, layout) if g.vectors.fan_in <= largest_fan_in]
    ratios = dict(_exact_ratio(model, loss, batch, gradient) for gradient in gradients)
    found = []
    if ratios:
        unit = max(ratios, key=lambda unit: ratios[unit])
        statement, formula = f"{THEOREM_4_2}: one weight vector, exact Hessian", "‖P∇²L‖ / ‖∇²L‖"
        bound, allowance = 1 + CENTERING * torch.finfo(torch.float64).eps, f"1 + {CENTERING} eps(float64)"
        where = f"{unit}; {len(ratios)} of {len(layout)} parameters measured"
        found.append(Measurement("theorem 4.2", statement, formula, ratios[unit], bound, allowance, where))
    whole = top_eigenvalue(model, loss, batch, tolerance=tolerance)
    norm, (eps, dtype) = abs(whole.value), coarsest_eps(p for p in model.parameters() if p.requires_grad)
    bound = norm * (1 + _CURVATURE * eps) + whole.residual
    allowance = f"‖∇²L‖ = {norm:.4g}, times 1 + {_CURVATURE} eps({dtype}), + its residual {whole.residual:.1e}"
    for formula, projected in (
        ("‖P∇²L‖", projected_norm(model, loss, batch, layout, tolerance=tolerance)),
        ("‖P∇²LP‖", top_eigenvalue(model, loss, batch, layout=layout, tolerance=tolerance)),
    ):
        where = f"{projected.iterations} Lanczos iterations, residual {projected.residual:.1e}"
        where += "" if projected.converged and whole.converged else ", NOT converged"
        statement, value = f"{THEOREM_4_2}: the whole network", abs(projected.value)
        found.append(Measurement("theorem 4.2", statement, formula, value, bound, allowance, where))
    return found


def _exact_ratio(model: nn.Module, loss: Loss, batch: Batch, parameter: ParameterGradient) -> tuple[str, float]:
    """‖P∇²L‖ / ‖∇²L‖ of the weight vector with the longest gradient, and the name of its unit."""
    name, w, g, vectors = parameter
    unit = int(double_rows(g, vectors).norm(dim=1).argmax())
    elements = as_rows(torch.arange(w.numel()).reshape(w.shape), vectors)[unit].tolist()
    H = hessian_matrix(model, loss, batch, parameters=[w], elements=elements).double()
    P = projection_matrix(vectors.fan_in, dtype=H.dtype, device=H.device)
    return f"{name}, unit {unit}", float(relative(torch.linalg.norm(P @ H, 2), torch.linalg.norm(H, 2)))
