"""The layout of a model: for each parameter, which elements form one weight vector, or why it is skipped."""

from __future__ import annotations

from gradcentral.layout.layout import WeightLayout, weight_layout
from gradcentral.layout.rules import Entry, LeaveAlone, axes, register_layout

__all__ = ["Entry", "LeaveAlone", "WeightLayout", "axes", "register_layout", "weight_layout"]
