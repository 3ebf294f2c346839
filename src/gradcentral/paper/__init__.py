"""The paper's figures and statements, measured on real networks: `draw_all`, behind ``gradcentral figures``."""

from __future__ import annotations

from gradcentral.paper.draw import FIGURES, draw_all

__all__ = ["FIGURES", "draw_all"]
