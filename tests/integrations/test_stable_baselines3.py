"""Stable-Baselines3: training equals that with an optimizer that centers by hand; GC after saving and loading."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradcentral
from tests.integrations.hand_written import difference, largest_mean, values_of, weights_of
from tests.integrations.pages import run_page

gymnasium: Any = pytest.importorskip("gymnasium", reason="needs gymnasium: run `make trainers`")
sb3: Any = pytest.importorskip("stable_baselines3", reason="needs stable-baselines3: run `make trainers`")


class _Environment(gymnasium.Env):  # type: ignore[misc]
    """Random observations and a reward that depends on the action."""

    def __init__(self, continuous: bool) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,)) if continuous else gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._time = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self._time += 1
        return self._observe(), float(np.sum(action)), self._time > 10, False, {}

    def _observe(self) -> Any:
        return self.np_random.uniform(0, 1, 4).astype(np.float32)  # of one sign, so that gradients have large means


class _ByHand(torch.optim.Adam):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and p.ndim > 1:
                p.grad -= p.grad.mean(1, keepdim=True)
        super().step()


_ON_POLICY = {"n_steps": 32}
_OFF_POLICY = {"learning_starts": 8, "batch_size": 8}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "PPO": {**_ON_POLICY, "batch_size": 16, "n_epochs": 2},
    "A2C": _ON_POLICY,
    "DQN": _OFF_POLICY,
    "SAC": _OFF_POLICY,
    "TD3": _OFF_POLICY,
}


def _environment(algorithm: str) -> _Environment:
    return _Environment(continuous=algorithm in ("SAC", "TD3"))


def _create(algorithm: str, **policy: Any) -> Any:
    kwargs = {"net_arch": [16], **policy}
    options = ALGORITHMS[algorithm]
    cls = getattr(sb3, algorithm)
    return cls("MlpPolicy", _environment(algorithm), seed=0, device="cpu", policy_kwargs=kwargs, **options)


def _optimizers(model: Any) -> list[Any]:
    parts = [model.policy, getattr(model, "actor", None), getattr(model, "critic", None)]
    return [part.optimizer for part in parts if getattr(part, "optimizer", None) is not None]


def _saved_and_loaded(model: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    algorithm = type(model).__name__
    return type(model).load(buffer, env=_environment(algorithm), device="cpu", **options)


def _largest_drift(model: Any) -> float:
    """Train, and return the largest change of a row's mean."""
    weights = weights_of(model.policy)
    start = [w.detach().clone() for w in weights]
    model.learn(64)
    return max(float((w.detach() - before).mean(1).abs().max()) for w, before in zip(weights, start, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_equals_that_with_an_optimizer_that_centers_by_hand(algorithm: str) -> None:
    def train(optimizer: Any) -> list[Tensor]:
        model = _create(algorithm, optimizer_class=optimizer, optimizer_kwargs={"eps": 1e-5})
        assert all(type(one) is optimizer for one in _optimizers(model))
        model.learn(64)
        return values_of(model.policy)

    centered = train(gradcentral.Adam)
    assert difference(centered, train(_ByHand)) < 1e-6
    assert difference(centered, train(torch.optim.Adam)) > 1e-4


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_centralize_equals_the_optimizer_class(algorithm: str) -> None:
    model = _create(algorithm, optimizer_kwargs={"eps": 1e-5})
    for optimizer in _optimizers(model):
        gradcentral.centralize(optimizer, model.policy)
    model.learn(64)
    other = _create(algorithm, optimizer_class=gradcentral.Adam, optimizer_kwargs={"eps": 1e-5})
    other.learn(64)
    assert difference(values_of(model.policy), values_of(other.policy)) < 1e-6


def test_ppo_has_a_default_of_its_own_for_eps_of_torch_adam_only() -> None:
    assert _create("PPO").policy.optimizer.defaults["eps"] == 1e-5
    assert _create("PPO", optimizer_class=gradcentral.Adam).policy.optimizer.defaults["eps"] == 1e-8


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_model_still_centers_with_the_optimizer_class(algorithm: str) -> None:
    options = {"optimizer_class": gradcentral.Adam, "optimizer_kwargs": {"placement": "update"}}
    model = _saved_and_loaded(_create(algorithm, **options))
    assert all(type(one) is gradcentral.Adam and one.placement == "update" for one in _optimizers(model))
    assert _largest_drift(model) < 1e-6
    assert _largest_drift(_create(algorithm)) > 1e-4


def test_a_loaded_model_has_lost_hooks_and_can_be_attached_to_again() -> None:
    model = _create("PPO")
    gradcentral.centralize(model.policy.optimizer, model.policy, "update")
    loaded = _saved_and_loaded(model)
    assert gradcentral.attached(model.policy.optimizer)
    assert not gradcentral.attached(loaded.policy.optimizer)
    assert _largest_drift(_saved_and_loaded(model)) > 1e-4
    gradcentral.centralize(loaded.policy.optimizer, loaded.policy, "update")
    assert _largest_drift(loaded) < 1e-6


def test_a_model_saved_without_gc_continues_with_it() -> None:
    policy = {"net_arch": [16], "optimizer_class": gradcentral.Adam, "optimizer_kwargs": {"placement": "update"}}
    model = _create("PPO")
    model.learn(64)
    loaded = _saved_and_loaded(model, custom_objects={"policy_kwargs": policy})
    assert type(loaded.policy.optimizer) is gradcentral.Adam
    moments, expected = loaded.policy.optimizer.state_dict()["state"], model.policy.optimizer.state_dict()["state"]
    assert torch.equal(moments[0]["exp_avg"], expected[0]["exp_avg"])
    assert _largest_drift(loaded) < 1e-6


def centralized_rmsprop(params: Any, **kwargs: Any) -> Any:
    """Return RMSprop with GC."""
    optimizer = torch.optim.RMSprop(params, **kwargs)
    gradcentral.centralize(optimizer, placement="update")
    return optimizer


def test_a_function_in_place_of_the_optimizer_class() -> None:
    model = _create("PPO", optimizer_class=centralized_rmsprop)
    assert _largest_drift(_saved_and_loaded(model)) < 1e-6


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown placement 'updates'"):
        _create("PPO", optimizer_class=gradcentral.Adam, optimizer_kwargs={"placement": "updates"})
    with pytest.raises(TypeError, match="gradcentral.centralize_in_backward"):
        gradcentral.centralize(_create("PPO"))


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("stable-baselines3")
    assert largest_mean(names["changes"]) < 1e-4
