"""Center a model's initial weights."""

from __future__ import annotations

import torch
from torch import nn

from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.projection import center_
from gradcentral.updates import check_usable

__all__ = ["center_weights_"]


def center_weights_(model: nn.Module, layout: WeightLayout | None = None) -> WeightLayout:
    """Make the mean of every weight vector zero, up to rounding: w ← Φ(w), in place.

    Under placement ``"update"`` the means then stay zero, and no unit's output changes when a constant is added to all
    of its inputs (theorem 4.1 with 1ᵀw⁰ = 0). Apply it before training: it changes the function of a trained model.

    Args:
        model: freshly initialized.
        layout: use this layout instead of ``weight_layout(model)``.

    Returns:
        The layout used.

    Raises:
        ValueError: nothing to center; a lazy parameter has no values yet; the layout belongs to another model.

    Source: Yong et al. 2020, section 4.1: the smaller ``|mean(w⁰)|``, the less sensitive the output.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(100, 3)
        >>> layout = center_weights_(model)
        >>> bool(model.weight.mean(1).abs().max() < 1e-8)
        True
    """
    layout = weight_layout(model) if layout is None else layout
    check_usable(layout, model)
    with torch.no_grad():
        for parameter, vectors in layout.items():
            center_(parameter, vectors)
    return layout
