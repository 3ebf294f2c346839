from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

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


class Untidy(nn.Module):
    """A module that changes attributes, hooks and ``requires_grad`` in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0
        self.outputs: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}
        self.noise = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.cache["x"] = x
        self.linear.bias.requires_grad_(False)
        self.linear.register_forward_hook(lambda *_: None)
        self.linear.weight.register_hook(lambda gradient: None)
        self.linear.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        x = self.linear(x + torch.rand(x.shape, generator=self.noise))
        self.outputs.append(x)
        return x


def test_attributes_and_hooks_are_restored() -> None:
    model = Untidy()
    first: Callable[..., None] = [].append
    outputs, state = model.outputs, model.noise.get_state()
    model.linear.weight.register_hook(first)
    model.linear.weight.register_post_accumulate_grad_hook(first)
    names = set(vars(model))
    with preserve_state(model):
        use(model)
        use(model)
        assert len(outputs) == 2
    assert set(vars(model)) == names
    assert (model.calls, model.outputs, model.cache) == (0, [], {})
    assert model.outputs is outputs
    assert torch.equal(model.noise.get_state(), state)
    assert model.linear.bias.requires_grad
    assert not model.linear._forward_hooks
    weight = model.linear.weight
    assert [*(weight._backward_hooks or {}).values()] == [first]
    assert [*weight._post_accumulate_grad_hooks.values()] == [first]


class Failing(nn.Module):
    """A module whose state cannot be restored, between modules whose state can."""

    def __init__(self) -> None:
        super().__init__()
        self.items = FailingList([1])

    def forward(self, x: Tensor) -> Tensor:
        return x


class FailingList(list[int]):
    """A list that refuses to be emptied."""

    def clear(self) -> None:
        raise RuntimeError("cannot be restored")


def test_everything_else_is_restored_if_one_restoration_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcentral.diagnostics.preserve._CONTAINERS", (dict, OrderedDict, set, FailingList))
    model = nn.Sequential(nn.BatchNorm1d(3), Failing(), nn.BatchNorm1d(3)).eval()
    gradient = model[0].weight.grad = torch.ones(3)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="cannot be restored"), preserve_state(model):
        use(model)
    assert not any(module.training for module in model.modules())
    assert [model.state_dict()[f"{i}.num_batches_tracked"].item() for i in (0, 2)] == [0, 0]
    assert model[0].weight.grad is gradient
    assert model[2].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


class Counting(nn.Module):
    """A module that can be scripted, and replaces its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1  # type: ignore[has-type]
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_modules_are_restored() -> None:
    model = torch.jit.script(nn.Sequential(Counting(), nn.BatchNorm1d(3), nn.Dropout()).eval())
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    with preserve_state(model):
        use(model)
        assert model.state_dict()["0.count"] == 1
        assert model.training
    assert not any(module.training for module in model.modules())
    for name, value in model.named_buffers():
        assert value is buffers[name]
        assert torch.equal(value, before[name])


def _quantized() -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(3, 3), torch.zeros(3, 3))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: torch.eye(3).to_sparse(), lambda w: w.copy_(torch.ones(3, 3).to_sparse())),
        (lambda: torch.eye(3).to_sparse_csr(), lambda w: w.copy_(2 * torch.eye(3).to_sparse_csr())),
        (lambda: torch.eye(3).to(torch.float8_e4m3fn), lambda w: w.view(torch.uint8).zero_()),
        (lambda: torch.full((3, 3), torch.nan), lambda w: w.zero_()),
        (_quantized, lambda w: w.b.add_(1)),
    ],
    ids=["sparse", "compressed rows", "float8", "NaN", "wrapper subclass"],
)
def test_frozen_tensors_of_any_kind_are_restored(make: Callable[[], Tensor], change: Callable[[Tensor], Any]) -> None:
    model = nn.Module()
    model.frozen = nn.Parameter(make(), requires_grad=False)
    model.trained = nn.Parameter(torch.ones(3))
    with preserve_state(model), torch.no_grad():
        change(model.frozen)
        assert not torch.equal(_dense(model.frozen), _dense(make()))
        model.trained.zero_()
    torch.testing.assert_close(_dense(model.frozen), _dense(make()), rtol=0, atol=0, equal_nan=True)
    assert model.trained.sum() == 3


def _dense(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    parts = [tensor.a, tensor.b] if hasattr(tensor, "b") else [tensor]
    return torch.stack([(part.to_dense() if part.layout != torch.strided else part).float() for part in parts])


def test_a_buffer_that_was_resized_is_restored() -> None:
    model, history = nn.Module(), torch.ones(2)
    model.register_buffer("history", history)
    with preserve_state(model):
        history.resize_(5).zero_()
    assert torch.equal(history, torch.ones(2))


def test_inference_mode_is_left_for_modules() -> None:
    model = nn.BatchNorm1d(3)
    with torch.inference_mode():
        with preserve_state(model), torch.enable_grad():
            assert model(torch.rand(4, 3)).requires_grad
        with preserve_state():
            assert torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    assert model.num_batches_tracked == 0
