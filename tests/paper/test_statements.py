"""`measure_all`: every statement holds with GC, and training without GC violates those about training."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcentral.experiment import Task, load_task
from gradcentral.paper import centered_initialization, measure_all
from tests.paper.networks import SGD_FACTORY, holding, mse


def test_measure_all_of_the_digits_network_holds_and_training_without_gc_does_not() -> None:
    task = load_task("digits")
    assert isinstance(task, Task)
    data: Any = task.train
    x, y = data.tensors
    model = task.model()
    assert isinstance(model, nn.Sequential)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    batches = list(zip(x[:192].split(32), y[:192].split(32), strict=True))
    found = measure_all(model, task.loss, batches, task.optimizers["sgd"])
    assert [measured.formula for measured in found if not measured.holds] == []
    trained = [measured for measured in found if measured.without is not None]
    assert [measured.source for measured in trained] == ["eq. 4", "theorem 4.1"]
    for measured in trained:
        assert measured.without is not None
        assert measured.without > 100 * measured.bound
    assert torch.equal(torch.get_rng_state(), random)
    assert not model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_optimizer_factory_may_iterate_over_its_parameters_twice() -> None:
    def decayed(params: Any) -> torch.optim.Optimizer:
        matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01}
        others = {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}
        assert others["params"]
        return torch.optim.SGD([matrices, others], lr=0.1)

    found = measure_all(nn.Linear(5, 2), mse, [(torch.rand(8, 5), torch.randn(8, 2))], decayed)
    assert all(holding(found))


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_modules_stay_in_evaluation_mode_while_the_copies_train(whole: bool) -> None:
    modes: list[bool] = []

    class Watched(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(input)

    model = nn.Sequential(nn.Linear(5, 4), Watched(4), nn.Linear(4, 2))
    # A whole model in evaluation mode is not frozen: that is only the mode of its last use.
    (model if whole else model[1]).eval()
    measure_all(model, mse, [(torch.rand(8, 5), torch.randn(8, 2))] * 2, SGD_FACTORY)
    assert set(modes) == {whole}
    assert not model[1].training


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 4, 3), nn.Tanh(), nn.Flatten(1)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 12))),
        nn.Sequential(nn.Bilinear(2, 3, 12)),
    ],
)
def test_statements_about_plain_layers_are_reported_as_skipped_if_there_are_none(model: nn.Sequential) -> None:
    if isinstance(model[0], nn.Bilinear):
        model.forward = lambda x: model[0](x[:, :2], x[:, 2:])  # type: ignore[method-assign]
    found = measure_all(model, mse, [(torch.rand(8, 5), torch.randn(8, 12))], SGD_FACTORY)
    assert all(holding(found))
    assert len(found) == 15 - 1 - 4
    assert [statement.source for statement in found.skipped] == ["theorem 4.1", "section 4.1"]
    for statement in found.skipped:
        assert "no centered Linear or convolution" in statement.reason


def test_the_curvature_is_skipped_where_torch_has_no_second_derivative() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    data = torch.randint(0, 10, (8, 3)), torch.randn(8, 2)
    found = measure_all(model, mse, [data], SGD_FACTORY)
    assert all(holding(found))
    (skipped,) = found.skipped
    assert skipped.source == "theorem 4.2"
    assert "_embedding_bag" in skipped.reason


def test_batches_may_be_mappings() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Outer()
    x, y = torch.rand(8, 5), torch.randn(8, 2)
    named = measure_all(model, lambda output, batch: mse(output, batch["y"]), [{"x": x, "y": y}] * 3, SGD_FACTORY)
    pairs = measure_all(nn.Sequential(model.inner), mse, [(x, y)] * 3, SGD_FACTORY)
    assert [(m.formula, m.value) for m in named] == [(m.formula, m.value) for m in pairs]


def test_both_copies_train_on_each_batch_with_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.LayerNorm(8), nn.Linear(8, 2))
    outputs: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach())
        return mse(output, target)

    taken = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            taken.append(len(outputs))
            yield torch.rand(8, 5), torch.randn(8, 2)

    measure_all(model, loss, batches(), SGD_FACTORY)
    assert taken == [0, 2]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])


def test_at_least_one_batch_is_required() -> None:
    with pytest.raises(ValueError, match="batches: give at least one"):
        measure_all(nn.Linear(5, 4), mse, [], torch.optim.SGD)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_model_that_cannot_be_copied_is_refused_and_the_suggested_parametrization_works(kind: str) -> None:
    def with_norm(function: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
        return nn.Sequential(function(nn.Linear(5, 4)), nn.Linear(4, 2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = with_norm(getattr(nn.utils, kind))
    data = torch.rand(8, 5), torch.randn(8, 2)
    mse(model(data[0]), data[1]).backward()
    with pytest.raises(ValueError, match=r"model: 0\.weight is a plain attribute") as caught:
        measure_all(model, mse, [data], SGD_FACTORY)
    with pytest.raises(ValueError, match=r"model: 0\.weight is a plain attribute"):
        centered_initialization(model)
    suggested = re.search(rf"torch\.nn\.utils\.parametrizations\.{kind}", str(caught.value))
    assert suggested is not None
    replaced = with_norm(eval(suggested[0], {"torch": torch}))
    assert all(holding(measure_all(replaced, mse, [data], SGD_FACTORY)))
