"""Figures are written to files reproducibly and in two themes."""

from __future__ import annotations

import re

from gradcentral.plotting import DARK, LIGHT, Theme, new_figure, recolor, style, to_svg


def _svg(theme: Theme) -> bytes:
    with style(theme):
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([0, 1], [1, 0], color=theme.arms["none"])
    return to_svg(figure)


def test_equal_figures_give_equal_svg_files() -> None:
    assert _svg(LIGHT) == _svg(LIGHT)


def test_recoloring_equals_drawing_in_the_other_theme() -> None:
    identifier = rb"m[0-9a-f]{10}"  # the id of a marker is a hash that includes its colors
    assert re.sub(identifier, b"", recolor(_svg(LIGHT), LIGHT, DARK)) == re.sub(identifier, b"", _svg(DARK))
