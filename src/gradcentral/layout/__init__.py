"""The layout of a model: for each parameter, which elements make one weight vector, or why it is skipped."""

from __future__ import annotations

from gradcentral.layout.entry import Entry
from gradcentral.layout.layout import WeightLayout, weight_layout
from gradcentral.layout.rules import LeaveAlone, register_layout

__all__ = ["Entry", "LeaveAlone", "WeightLayout", "register_layout", "weight_layout"]
