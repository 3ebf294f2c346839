from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradcentral.diagnostics.preserve import preserve_state


class Replacing(nn.Module):
    """A module that replaces its buffer with a new tensor in every forward pass."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return torch.as_tensor(self.linear(x))


def use(model: nn.Module) -> None:
    model.train()
    model(torch.rand(4, 3) + random.random() + np.random.rand()).sum().backward()


def fail(model: nn.Module) -> None:
    use(model)
    raise RuntimeError("stop")


def test_gradients_buffers_modes_and_random_numbers_are_restored() -> None:
    model = nn.Sequential(Replacing(), nn.BatchNorm1d(3), nn.Dropout()).eval()
    model[0].train()
    use(model)
    model.eval()
    model[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    with preserve_state(model):
        assert all(p.grad is None for p in model.parameters())
        use(model)
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, (tensor, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is tensor
        assert torch.equal(tensor, value)
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_state_is_restored_after_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="stop"), preserve_state(model):
        fail(model)
    assert model[0].num_batches_tracked == 0
    assert model[0].weight.grad is None


def test_a_lazy_model_raises_until_it_has_run_once() -> None:
    model = nn.LazyLinear(3)
    message = "weight is uninitialized .*; run one forward pass of the model first"
    with pytest.raises(ValueError, match=message), preserve_state(model):
        pass
    model(torch.rand(2, 4))
    with preserve_state(model):
        pass


def test_without_modules_only_random_numbers_are_restored() -> None:
    model, own = nn.BatchNorm1d(3), torch.Generator()
    states = torch.get_rng_state(), own.get_state()
    with preserve_state(generators=[own]):
        model(torch.rand(4, 3) + torch.rand(1, generator=own))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.get_state(), states[1])
    assert model.num_batches_tracked == 1


class Caching(nn.Module):
    """A module that fills a buffer that was None, and registers another one."""

    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)
        self.table = nn.Embedding(5, 3, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x)
        self.cache = found.detach()
        self.register_buffer("made", found.detach(), persistent=False)
        return found


def test_weights_are_restored_and_new_buffers_removed() -> None:
    model = Caching()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with preserve_state(model):
        model(torch.arange(5))
        assert not torch.equal(model.table.weight, before["table.weight"])
        assert set(model.state_dict()) == {"table.weight", "cache"}
    assert set(model.state_dict()) == set(before) == {"table.weight"}
    assert torch.equal(model.table.weight, before["table.weight"])
    assert not hasattr(model, "made")
    assert model.cache is None


def test_a_lazy_buffer_raises() -> None:
    norm = nn.LazyBatchNorm1d(affine=False)
    with pytest.raises(ValueError, match="running_mean is uninitialized"), preserve_state(norm):
        pass
