"""How far the mean of each weight vector has moved: eᵀ(w − w⁰), zero under placement "update"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcentral.layout import WeightLayout
from gradcentral.projection import unit_means

__all__ = ["Drift"]


class Drift:
    """eᵀ(w − w⁰) = √M (mean(w) − mean(w⁰)) of each weight vector, w⁰ being the weights when this was made.

    Keeps one number for each weight vector, in double precision where the device has it.

    Args:
        layout: of the model; lazy parameters must have their shapes.

    Source: Yong et al. 2020, section 4.1: GC keeps w on the hyperplane eᵀ(w − w⁰) = 0.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 1)
        >>> drift = Drift(gradcentral.weight_layout(model))
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(0.5)
        >>> drift.of(model.weight)
        tensor([1.], dtype=torch.float64)
    """

    def __init__(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._start = {parameter: self._means(parameter) for parameter in layout}

    def of(self, parameter: Tensor) -> Tensor:
        """One number for each weight vector of a centered parameter, in one dimension.

        Raises:
            KeyError: the layout leaves the parameter alone.
        """
        vectors = self._layout[parameter]
        return math.sqrt(vectors.fan_in) * (self._means(parameter) - self._start[parameter])

    def total(self) -> float:
        """‖eᵀ(w − w⁰)‖ over all weight vectors together (L2)."""
        norms = [torch.linalg.vector_norm(self.of(parameter)).cpu() for parameter in self._layout]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _means(self, parameter: Tensor) -> Tensor:
        w = parameter.detach()
        if w.device.type != "mps":
            w = w.to(torch.complex128 if w.is_complex() else torch.float64)
        return unit_means(w, self._layout[parameter]).flatten()
