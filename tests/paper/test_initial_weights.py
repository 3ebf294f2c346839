"""The means of initial weights agree with theory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from gradcentral.paper import centered_initialization, initial_means, initial_means_near_zero, initial_weights
from gradcentral.paper.initial_weights import SCHEMES
from tests.paper.networks import holding, network


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(2000, 16, 3, 3), (3000, 50)])
def test_initial_means_have_the_spread_that_theory_predicts(scheme: str, shape: tuple[int, ...]) -> None:
    means = initial_means(shape, scheme)
    assert means.absolute.shape == shape[:1]
    # The root mean square of n normal numbers has a relative standard error of 1/√(2n).
    rms = float(means.absolute.square().mean().sqrt())
    assert rms == pytest.approx(means.expected, rel=5 / math.sqrt(2 * shape[0]))
    # Half-normal: the mean of |mean| is √(2/π) of the standard deviation.
    assert float(means.absolute.mean()) == pytest.approx(means.expected * math.sqrt(2 / math.pi), rel=0.1)


def test_expected_deviation_is_that_of_the_weights_over_root_M() -> None:
    assert initial_means((8, 4, 3, 3), "xavier_normal").expected == pytest.approx(math.sqrt(2 / (36 + 72)) / 6)
    assert initial_means((8, 4, 3, 3), "kaiming_uniform").expected == pytest.approx(math.sqrt(2 / 36) / 6)


def test_the_sample_is_seeded_and_does_not_use_the_global_generator() -> None:
    random = torch.get_rng_state()
    first = initial_means((5, 7), "xavier_uniform", seed=1).absolute
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(initial_means((5, 7), "xavier_uniform", seed=1).absolute, first)
    assert not torch.equal(initial_means((5, 7), "xavier_uniform", seed=2).absolute, first)


def test_unknown_schemes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown initialization 'lecun'; choose from xavier_uniform") as caught:
        initial_means((5, 7), "lecun")
    for scheme in str(caught.value).partition("choose from ")[2].split(", "):
        assert len(initial_means((5, 7), scheme).absolute) == 5
    with pytest.raises(ValueError, match="shape must be"):
        initial_means((5,), "xavier_normal")


def test_weights_with_a_mean_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert holding(initial_means_near_zero(network())) == [True] * 4

    def biased(*args: Any, **kwargs: Any) -> Any:
        means = initial_means(*args, **kwargs)
        return means._replace(absolute=means.absolute + 5 * means.expected)

    monkeypatch.setattr(initial_weights, "initial_means", biased)
    assert holding(initial_means_near_zero(network())) == [False] * 4


def test_centered_initialization_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    assert centered_initialization(model).holds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(initial_weights, "center_weights_", lambda model, layout: layout)
    assert not centered_initialization(model).holds
