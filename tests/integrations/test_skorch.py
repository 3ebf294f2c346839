"""skorch: nets with gradcentral's optimizers, or with a callback that attaches, equal loops with GC written by hand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.integrations import hand_written
from tests.integrations.hand_written import batches, difference, network
from tests.integrations.pages import run_page

skorch = pytest.importorskip("skorch", reason="needs skorch: run `make trainers`")

from sklearn.model_selection import GridSearchCV  # noqa: E402
from skorch.callbacks import Callback, GradientNormClipping  # noqa: E402

ROUNDING = 1e-6
IMAGES, CLASSES = (tensor.numpy() for tensor in hand_written.data())


class Net(nn.Module):
    """The network, created by skorch from its class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]


class Centralize(Callback):  # type: ignore[misc]
    """The callback of the page."""

    def on_train_begin(self, net: Any, **_: Any) -> None:
        gradcentral.centralize(net.optimizer_, net.module_)


def create(optimizer: Any = gradcentral.SGD, **options: Any) -> Any:
    return skorch.NeuralNetClassifier(
        Net,
        criterion=nn.CrossEntropyLoss,
        optimizer=optimizer,
        lr=0.1,
        max_epochs=1,
        batch_size=8,
        train_split=None,
        verbose=0,
        **options,
    )


def fit(optimizer: Any = gradcentral.SGD, **options: Any) -> Any:
    return create(optimizer, **options).fit(IMAGES, CLASSES)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_optimizer_of_gradcentral_finds_the_layers(placement: str) -> None:
    options = {"optimizer__placement": placement, "optimizer__momentum": 0.9, "optimizer__weight_decay": 0.01}
    net = fit(**options)

    def sgd(parameters: Any) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)

    by_hand = hand_written.train(network(), batches(), sgd, placement, weight_decay=0.01)
    assert difference(net.module_.net, by_hand) < ROUNDING
    assert difference(net.module_.net, hand_written.train(network(), batches(), sgd, None)) > 1000 * ROUNDING


def test_parameter_groups_by_name() -> None:
    net = fit(optimizer__placement="update", optimizer__param_groups=[("net.0.*", {"lr": 0.05})])
    assert [group["lr"] for group in net.optimizer_.param_groups] == [0.05, 0.1]
    for trained, start in zip(net.module_.net.parameters(), network().parameters(), strict=True):
        if trained.ndim > 1:
            assert (trained - start).flatten(1).mean(1).abs().max() < ROUNDING


@pytest.mark.parametrize("attach", ["gradcentral", "callback"])
def test_skorch_clips_first_and_centers_second(attach: str) -> None:
    clipping = GradientNormClipping(0.05)
    if attach == "gradcentral":
        net = fit(callbacks=[clipping])
    else:
        net = fit(torch.optim.SGD, callbacks=[Centralize(), clipping])
    by_hand = hand_written.train(network(), batches(), clip=0.05)
    assert difference(net.module_.net, by_hand) < ROUNDING
    other_order = hand_written.train(network(), batches(), clip=0.05, clip_first=False)
    assert difference(net.module_.net, other_order) > 100 * ROUNDING


def test_centering_before_clipping() -> None:
    class CenterGradients(Callback):  # type: ignore[misc]
        def on_grad_computed(self, net: Any, **_: Any) -> None:
            gradcentral.centralize_gradients(net.module_)

    net = fit(torch.optim.SGD, callbacks=[CenterGradients(), GradientNormClipping(0.05)])
    by_hand = hand_written.train(network(), batches(), clip=0.05, clip_first=False)
    assert difference(net.module_.net, by_hand) < ROUNDING


def test_the_callback_attaches_again_after_pickling_and_set_params() -> None:
    net = pickle.loads(pickle.dumps(fit(torch.optim.SGD, callbacks=[Centralize()])))
    assert gradcentral.attached(net.optimizer_) == []
    net.partial_fit(IMAGES, CLASSES)
    by_hand = hand_written.train(network(), batches() * 2)
    assert difference(net.module_.net, by_hand) < ROUNDING
    net.set_params(optimizer__momentum=0.5)  # skorch creates another optimizer
    net.partial_fit(IMAGES, CLASSES)
    assert len(gradcentral.attached(net.optimizer_)) == 1


def test_a_pickled_net_with_an_optimizer_of_gradcentral_continues_bit_identically() -> None:
    net = fit(optimizer__momentum=0.9)
    copy = pickle.loads(pickle.dumps(net))
    for one in (net, copy):
        one.partial_fit(IMAGES, CLASSES)
    assert all(map(torch.equal, net.module_.parameters(), copy.module_.parameters()))
    by_hand = hand_written.train(network(), batches() * 2, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert difference(copy.module_.net, by_hand) < ROUNDING


def test_saved_parameters_resume_bit_identically(tmp_path: Path) -> None:
    files = {"f_params": tmp_path / "weights.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net = fit(optimizer__momentum=0.9)
    net.save_params(**files)
    resumed = create(optimizer__momentum=0.9).initialize()
    resumed.load_params(**files)
    for one in (net, resumed):
        one.partial_fit(IMAGES, CLASSES)
    assert all(map(torch.equal, net.module_.parameters(), resumed.module_.parameters()))


def test_a_grid_search_over_placements() -> None:
    grid = {"optimizer__placement": ["gradient", "update"], "optimizer__strength": [0.0, 1.0]}
    search = GridSearchCV(create(), grid, cv=2, scoring="neg_log_loss", error_score="raise").fit(IMAGES, CLASSES)
    scores = dict(zip(map(str, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
    # Plain SGD has no weight decay, so both placements are the same, unlike training without GC.
    off, on = ([score for name, score in scores.items() if f"strength': {value}" in name] for value in (0.0, 1.0))
    assert on[0] == pytest.approx(on[1], abs=1e-6)
    assert abs(on[0] - off[0]) > 1e-4


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("skorch")
    assert page["drift"] < 1e-6
    assert page["attached"] == 1
