"""Opacus: GC acts after clipping and noise, in each mode, and leaves the accounting unchanged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradcentral
from tests.integrations.hand_written import center_by_hand, difference, largest_mean, values_of, weights_of
from tests.integrations.pages import run_page

opacus: Any = pytest.importorskip("opacus", reason="needs opacus: run `make trainers`")
BatchMemoryManager: Any = importlib.import_module("opacus.utils.batch_memory_manager").BatchMemoryManager

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
MODES = ["hooks", "functorch", "ew", "ghost"]
DATA = TensorDataset(
    torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.randint(10, (64,), generator=torch.Generator().manual_seed(2)),
)


class _Training:
    """A model, its private optimizer, and one epoch of training.

    Args:
        attach: called before ``make_private``, with the optimizer and the model.
        attach_later: called after it, with the private optimizer and the private model.
        ours: train with ``gradcentral.SGD``.
        by_hand: center between the noise and the step.
        virtual: split each batch in two.
    """

    def __init__(
        self,
        mode: str,
        attach: Callable[..., Any] | None = None,
        attach_later: Callable[..., Any] | None = None,
        ours: bool = False,
        by_hand: bool = False,
        virtual: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
        self.start = [w.detach().clone() for w in weights_of(self.model)]
        self.by_hand, self.virtual = by_hand, virtual
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        inner: Any = (gradcentral.SGD if ours else torch.optim.SGD)(self.model.parameters(), **options)
        if attach is not None:
            attach(inner, self.model)
        self.engine = opacus.PrivacyEngine(accountant="rdp")  # the default accountant takes seconds
        self.criterion: Any = nn.CrossEntropyLoss()
        created = self.engine.make_private(
            module=self.model,
            optimizer=inner,
            criterion=self.criterion,
            data_loader=DataLoader(DATA, batch_size=16),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(3),
            grad_sample_mode=mode,
        )
        if mode == "ghost":
            self.private, self.optimizer, self.criterion, self.loader = created
        else:
            self.private, self.optimizer, self.loader = created
        if attach_later is not None:
            attach_later(self.optimizer, self.private)

    def backward(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.private(images), labels).backward()

    def run(self) -> list[Tensor]:
        split = BatchMemoryManager(data_loader=self.loader, max_physical_batch_size=8, optimizer=self.optimizer)
        with split if self.virtual else nullcontext(self.loader) as loader:
            for images, labels in loader:
                self.backward(images, labels)
                if not self.by_hand:
                    self.optimizer.step()
                elif self.optimizer.pre_step():
                    center_by_hand(self.model)
                    self.optimizer.original_optimizer.step()
        return values_of(self.model)

    def changes(self) -> list[Tensor]:
        return [w.detach() - start for w, start in zip(weights_of(self.model), self.start, strict=True)]


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gc_acts_between_the_noise_and_the_step(mode: str, virtual: bool) -> None:
    by_hand = _Training(mode, by_hand=True, virtual=virtual)
    expected = by_hand.run()
    trainings = [
        _Training(mode, attach=gradcentral.centralize, virtual=virtual),
        _Training(mode, attach_later=gradcentral.centralize, virtual=virtual),
        _Training(mode, ours=True, virtual=virtual),
    ]
    plain = _Training(mode, virtual=virtual)
    assert difference(expected, plain.run()) > 1e-3
    for training in trainings:
        assert difference(training.run(), expected) < 1e-6
        assert training.engine.get_epsilon(1e-5) == plain.engine.get_epsilon(1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_placement_update_keeps_the_means(mode: str) -> None:
    training = _Training(mode, attach=lambda optimizer, model: gradcentral.centralize(optimizer, model, "update"))
    training.run()
    assert largest_mean(training.changes()) < 1e-5
    plain = _Training(mode)
    plain.run()
    assert largest_mean(plain.changes()) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_centering_before_opacus_computes_the_gradients_raises(mode: str) -> None:
    images, labels = DATA[:8]
    training = _Training(mode)
    training.backward(images, labels)
    with pytest.raises(ValueError, match="from which Opacus computes p.grad inside its step: attach to the optimizer"):
        gradcentral.centralize_gradients(training.private)
    with pytest.raises(ValueError, match="from which Opacus computes p.grad inside its step: attach to the optimizer"):
        gradcentral.centralize_in_backward(training.private)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])  # in the mode "ew", torch itself raises an error
def test_centering_in_backward_from_before_make_private_raises(mode: str) -> None:
    training = _Training(mode, attach=lambda _, model: gradcentral.centralize_in_backward(model))
    with pytest.raises(ValueError, match="from which Opacus computes p.grad inside its step: attach to the optimizer"):
        training.run()


def test_page() -> None:
    names = run_page("opacus")
    assert largest_mean(names["changes"]) < 1e-4
