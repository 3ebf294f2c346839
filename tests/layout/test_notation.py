"""The bracket notation is accepted wherever a layout is given, and printed wherever one is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from gradcentral import WeightLayout, WeightVectors, center, register_layout, share, weight_layout
from gradcentral.layout import report
from tests.strategies import Written, written_patterns


class Layer(nn.Module):
    """A layer with one weight that no rule covers."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


def by_override(pattern: str, shape: tuple[int, ...]) -> WeightLayout:
    return weight_layout(Layer(*shape), overrides={"weight": pattern})


def by_registration(pattern: str, shape: tuple[int, ...]) -> WeightLayout:
    registered = type("Registered", (Layer,), {})
    register_layout(registered, "weight", pattern)
    return weight_layout(registered(*shape))


def by_declaration(pattern: str, shape: tuple[int, ...]) -> WeightLayout:
    declared = type("Declared", (Layer,), {"weight_vectors": {"weight": pattern}})
    return weight_layout(declared(*shape))


def by_function(pattern: str, shape: tuple[int, ...]) -> WeightLayout:
    rule: Callable[[nn.Module, Tensor], str] = lambda module, tensor: pattern  # noqa: E731
    return weight_layout(Layer(*shape), overrides={"weight": rule})


ROUTES = [by_override, by_registration, by_declaration, by_function]


@given(written_patterns())
def test_every_route_accepts_a_pattern_and_prints_it(written: Written) -> None:
    vectors = written.vectors
    pattern = vectors.pattern
    for route in ROUTES:
        layout = route(pattern, written.shape)
        assert layout["weight"] == vectors
        row = next(line for line in str(layout).splitlines() if line.startswith("weight "))
        printed = layout["weight"].pattern
        assert f"{vectors.count} × {vectors.fan_in}  {printed}  " in row
        assert WeightVectors.parse(printed, written.shape) == vectors


@given(written_patterns())
def test_json_gives_the_pattern_with_its_span_and_view(written: Written) -> None:
    vectors = written.vectors
    model = Layer(*written.shape)
    found = report.as_json(model, weight_layout(model, overrides={"weight": vectors}))
    (parameter,) = json.loads(json.dumps(found))["parameters"]
    shown = parameter["weight_vectors"]
    assert WeightVectors.parse(shown["pattern"], parameter["shape"]) == vectors
    assert WeightVectors(shown["span"], shown["view"], parameter["shape"]) == vectors
    assert (shown["count"], shown["fan_in"]) == (vectors.count, vectors.fan_in)


@given(written_patterns())
def test_center_and_share_accept_a_pattern(written: Written) -> None:
    vectors = written.vectors
    g = torch.randn(written.shape, dtype=torch.float64)
    assert torch.equal(center(g, vectors.pattern), center(g, vectors))
    assert torch.equal(share(g, vectors.pattern), share(g, vectors))
    g = g.reshape(vectors.dims)
    expected = (g - g.mean(vectors.span, keepdim=True)).reshape(written.shape)
    torch.testing.assert_close(center(g.reshape(written.shape), vectors.pattern), expected)


@pytest.mark.parametrize("use", [*ROUTES, lambda p, s: center(torch.ones(s), p), lambda p, s: share(torch.ones(s), p)])
@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("o [i k]", "the pattern has 3 axes, but the shape has 2"),
        ("(5 [i]) o", "axis 0 has size 8, which is not a multiple of 5"),
        ("(g [i]) o", "the sizes of g and i are unknown"),
    ],
)
def test_every_route_refuses_a_pattern_that_does_not_fit_with_the_pattern_and_the_shape(
    use: Callable[[str, tuple[int, ...]], Any], pattern: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="weight|pattern") as refused:
        use(pattern, (8, 4))
    assert f"pattern {pattern!r} for shape (8, 4): {problem}" in str(refused.value)


@pytest.mark.parametrize("use", ROUTES)
def test_every_route_names_a_malformed_pattern(use: Callable[[str, tuple[int, ...]], Any]) -> None:
    with pytest.raises(ValueError, match="weight.*pattern 'o i'.*: put brackets around the axes .* as in 'o .i.'"):
        use("o i", (8, 4))
