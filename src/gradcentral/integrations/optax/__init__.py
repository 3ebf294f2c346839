"""Gradient Centralization for optax, with the axes of Flax, Equinox and Haiku. It imports no torch.

    layout = weight_layout(model)
    optimizer = optax.chain(centralize(layout), optax.adamw(1e-3))

The documentation is docs/jax-and-keras.md.
"""

from __future__ import annotations

from gradcentral.integrations.named_layout import NamedLayout, Skip
from gradcentral.integrations.optax.models import weight_layout
from gradcentral.integrations.optax.transformation import centralize

__all__ = ["NamedLayout", "Skip", "centralize", "weight_layout"]
