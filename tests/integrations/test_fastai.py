"""fastai: each way to use GC in a Learner equals loops with GC written by hand."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradcentral
from gradcentral.targets import PLACEMENTS
from tests.integrations import hand_written
from tests.integrations.hand_written import batches, difference, network
from tests.integrations.pages import run_page

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai's own use of pandas and torch
    basics: Any = pytest.importorskip("fastai.basics", reason="needs fastai: run `make trainers`")
    from fastai.callback.all import GradientAccumulation, GradientClip
    from fastai.optimizer import SGD, Adam, OptimWrapper

ROUNDING = 1e-6


class CenteredUpdate(basics.Callback):  # type: ignore[misc]
    """The callback of the page for placement "update" with fastai's own optimizers."""

    def before_step(self) -> None:
        self.block = gradcentral.centered_update(self.model)
        self.block.__enter__()

    def after_step(self) -> None:
        self.block.__exit__(None, None, None)


class CenterAfterClipping(basics.Callback):  # type: ignore[misc]
    order = GradientClip.order + 1

    def before_step(self) -> None:
        gradcentral.centralize_gradients(self.model)


def learner(net: nn.Module, optimizer: Any, callbacks: Any = (), **options: Any) -> Any:
    images, classes = hand_written.data()
    data = list(zip(images, classes, strict=True))
    loaders = basics.DataLoaders(*(basics.DataLoader(data, bs=8, shuffle=False, num_workers=0) for _ in range(2)))
    return basics.Learner(loaders, net, loss_func=cross_entropy, opt_func=optimizer, cbs=list(callbacks), **options)


def fit(learn: Any, lr: float = 0.1, **options: Any) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=lr, **options)


def test_centralize_in_backward_with_an_optimizer_of_fastai() -> None:
    net = network()
    learn = learner(net, SGD)
    gradcentral.centralize_in_backward(learn.model)
    fit(learn)
    by_hand = hand_written.train(network(), batches())
    assert difference(net, by_hand) < ROUNDING
    assert difference(net, hand_written.train(network(), batches(), placement=None)) > 1000 * ROUNDING


def test_centralize_in_backward_centers_before_clipping_and_with_accumulation() -> None:
    net = network()
    learn = learner(net, SGD, [GradientClip(0.05), GradientAccumulation(16)])
    gradcentral.centralize_in_backward(learn.model)
    fit(learn)
    options: dict[str, Any] = {"accumulate": 2, "clip": 0.05}
    by_hand = hand_written.train(network(), batches(), **options, clip_first=False)
    assert difference(net, by_hand) < ROUNDING
    assert difference(net, hand_written.train(network(), batches(), **options)) > 100 * ROUNDING


def test_centralize_gradients_after_clipping() -> None:
    net = network()
    fit(learner(net, SGD, [GradientClip(0.05), CenterAfterClipping()]))
    assert difference(net, hand_written.train(network(), batches(), clip=0.05)) < ROUNDING


def test_placement_update_with_an_optimizer_of_fastai() -> None:
    net = network()
    fit(learner(net, partial(Adam, wd=0.1), [CenteredUpdate()]), lr=0.01)
    without = network()
    fit(learner(without, partial(Adam, wd=0.1)), lr=0.01)
    for p, plain, start in zip(net.parameters(), without.parameters(), network().parameters(), strict=True):
        if p.ndim > 1:
            assert (p - start).flatten(1).mean(1).abs().max() < ROUNDING
            assert (plain - start).flatten(1).mean(1).abs().max() > 1000 * ROUNDING


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_optimizer_of_gradcentral_in_fastais_wrapper(placement: str) -> None:
    net = network()
    optimizer = partial(gradcentral.SGD, momentum=0.9, weight_decay=0.01, placement=placement)
    fit(learner(net, partial(OptimWrapper, opt=optimizer), [GradientClip(0.05)]))

    def sgd(parameters: Any) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)

    by_hand = hand_written.train(network(), batches(), sgd, placement, clip=0.05, weight_decay=0.01)
    assert difference(net, by_hand) < ROUNDING


def test_frozen_groups_and_schedules_with_an_optimizer_of_gradcentral(tmp_path: Path) -> None:
    net: Any = network()
    optimizer = partial(OptimWrapper, opt=partial(gradcentral.AdamW, placement="update"))
    groups = {"splitter": lambda model: [list(model[:2].parameters()), list(model[2:].parameters())]}
    learn = learner(net, optimizer, path=tmp_path, **groups)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit_one_cycle(1, 0.01)
        assert torch.equal(net[0].weight, next(network().parameters()))
        learn.unfreeze()
        learn.fit_one_cycle(1, slice(0.001, 0.01))
    for p, start in zip(net.parameters(), network().parameters(), strict=True):
        if p.ndim > 1:
            assert (p - start).abs().max() > 1e-4
            assert (p - start).flatten(1).mean(1).abs().max() < ROUNDING


def test_attaching_to_a_wrapped_optimizer_lasts_until_fastai_creates_another_one() -> None:
    net = network()
    learn = learner(net, partial(OptimWrapper, opt=torch.optim.SGD))
    learn.create_opt()
    gradcentral.centralize(learn.opt, learn.model)
    fit(learn)
    assert difference(net, hand_written.train(network(), batches())) < ROUNDING
    fit(learn, reset_opt=True)
    assert gradcentral.attached(learn.opt.opt) == []


def test_an_optimizer_of_fastai_is_refused_with_a_remedy_that_works() -> None:
    learn = learner(network(), SGD)
    learn.create_opt()
    with pytest.raises(TypeError, match=r"call gradcentral.centralize_in_backward\(model\) once"):
        gradcentral.centralize(learn.opt, learn.model)


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page("fastai")
    assert page["largest_mean"] < 1e-6
    assert page["steps"] == 8
