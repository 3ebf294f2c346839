"""The callback for Lightning with several networks and optimizers, manual optimization and finetuning; its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, Adam, Optimizer

import gradcentral
from tests.integrations import hand_written
from tests.integrations.hand_written import batches, difference, network, sgd
from tests.integrations.lightning_runs import QUIET, fit, module

lightning: Any = pytest.importorskip("lightning.pytorch", reason="needs lightning: run `make trainers`")

from gradcentral.integrations.lightning import GradientCentralization  # noqa: E402

pytestmark = QUIET
ROUNDING = 1e-6


class Gan(lightning.LightningModule):  # type: ignore[misc]
    """A generator and a discriminator with an optimizer each."""

    def __init__(self, optimizer: Any = Adam) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))
        self.discriminator = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
        self.automatic_optimization = False
        self.optimizer = optimizer

    def configure_optimizers(self) -> list[Optimizer]:
        return [self.optimizer(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]

    def training_step(self, batch: Any, index: int) -> None:
        generator, discriminator = self.optimizers()
        for loss, optimizer in zip(self.losses(batch[0], index), (discriminator, generator), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def losses(self, images: Tensor, index: int) -> list[Any]:
        noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(index))
        ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)
        judge = binary_cross_entropy_with_logits

        def of_discriminator() -> Tensor:
            fake = self.discriminator(self.generator(noise).detach())
            return judge(self.discriminator(images), ones) + judge(fake, zeros)

        return [of_discriminator, lambda: judge(self.discriminator(self.generator(noise)), ones)]


def train_by_hand(gan: Gan, generator: str | None, discriminator: str | None) -> Gan:
    """Train a GAN without Lightning, with a placement of GC per network."""
    optimizers = gan.configure_optimizers()
    for index, (images, _) in enumerate(batches()):
        sides = [(gan.discriminator, optimizers[1], discriminator), (gan.generator, optimizers[0], generator)]
        for loss, (net, optimizer, placement) in zip(gan.losses(images, index), sides, strict=True):
            gan.zero_grad()
            loss().backward()
            weights = [p for p in net.parameters() if p.ndim > 1]
            before = [p.detach().clone() for p in weights]
            for p in weights:
                assert p.grad is not None
                if placement == "gradient":
                    p.grad -= p.grad.flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1))
            optimizer.step()
            with torch.no_grad():
                for p, start in zip(weights, before, strict=True):
                    if placement == "update":
                        p.sub_((p - start).flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1)))
    return gan


def test_one_callback_centers_all_networks_of_a_gan() -> None:
    gan: Any = Gan()
    callback: Any = GradientCentralization("update", monitor=4)
    fit(gan, callback)
    assert difference(gan, train_by_hand(Gan(), "update", "update")) < ROUNDING
    assert [monitor.name for monitor in callback.monitors] == ["optimizer0", "optimizer1"]
    assert [[record.step for record in monitor.records] for monitor in callback.monitors] == [[0, 4], [0, 4]]
    assert all(monitor.records[-1].net.drift < 1e-5 for monitor in callback.monitors)


def test_each_network_of_a_gan_may_have_its_own_settings(tmp_path: Any) -> None:
    def callbacks() -> list[Any]:
        return [
            GradientCentralization("gradient", submodule="generator", monitor=2),
            GradientCentralization("update", submodule="discriminator", monitor=4),
        ]

    gan, both, logger = Gan(), callbacks(), lightning.loggers.CSVLogger(tmp_path)
    trainer = fit(gan, *both, logger=logger)
    assert difference(gan, train_by_hand(Gan(), "gradient", "update")) < ROUNDING
    assert difference(gan, train_by_hand(Gan(), None, "update")) > 1000 * ROUNDING
    names = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"generator/gc/share", "discriminator/gc_drift/0.weight"} <= set(names)

    trainer.save_checkpoint(tmp_path / "gan.ckpt")
    resumed, more = Gan(), callbacks()
    fit(resumed, *more, max_epochs=2, ckpt_path=tmp_path / "gan.ckpt")
    assert [record.step for record in more[0].monitors[0].records] == [8, 10, 12, 14]
    assert [record.step for record in more[1].monitors[0].records] == [8, 12]
    after, before = (next(net.discriminator.parameters()).flatten(1).mean(1) for net in (resumed, Gan()))
    assert more[1].monitors[0].records[-1].layers["0.weight"].drift < 1e-5
    assert (after - before).abs().max() < ROUNDING


def test_an_optimizer_of_biases_is_left_as_it_is() -> None:
    class Two(type(module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> list[Optimizer]:
            biases, weights = ([p for p in self.parameters() if (p.ndim > 1) is wanted] for wanted in (False, True))
            return [SGD(biases, lr=0.1), sgd(weights)]

        def training_step(self, batch: Any, _: int) -> None:
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    model, callback = Two(), GradientCentralization(monitor=4)
    fit(model, callback)
    assert [monitor.name for monitor in callback.monitors] == ["optimizer1"]

    def both(parameters: Any) -> Optimizer:
        groups = [
            {"params": [p], "momentum": 0.9 * (p.ndim > 1), "weight_decay": 0.01 * (p.ndim > 1)} for p in parameters
        ]
        return SGD(groups, lr=0.1)

    assert difference(model.net, hand_written.train(network(), batches(), both)) < ROUNDING


def test_manual_optimization_with_accumulation_and_clipping() -> None:
    class Manual(type(module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]) / 2)
            if index % 2:
                self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    model = Manual()
    fit(model, GradientCentralization())
    by_hand = hand_written.train(network(), batches(), sgd, accumulate=2, clip=0.05)
    assert difference(model.net, by_hand) < ROUNDING


def test_layers_that_a_finetuning_callback_unfreezes_are_centered() -> None:
    class Finetuning(lightning.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)

    model = module()
    model.configure_optimizers = lambda: SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    fit(model, GradientCentralization("update"), Finetuning(), max_epochs=2)
    moved = model.net[0].weight - network()[0].weight
    assert moved.abs().max() > 1e-3
    assert moved.flatten(1).mean(1).abs().max() < ROUNDING


def test_placement_none_records_an_optimizer_of_gradcentral_and_one_without_gc() -> None:
    for optimizer, placement in ((lambda p: gradcentral.SGD(p, lr=0.1), "gradient"), (sgd, None)):
        callback: Any = GradientCentralization(None, monitor=8)
        fit(module(optimizer), callback)
        (record,) = callback.monitors[0].records
        assert record.placement == placement
        assert record.net.share > 0.1
        assert callback.handle is None
    callback = GradientCentralization(None, only="conv", monitor=8)
    fit(module(), callback)
    assert [*callback.monitors[0].records[0].layers] == ["net.0.weight"]


def test_errors_name_the_option_and_their_remedies_work() -> None:
    with pytest.raises(ValueError, match="placement=None attaches nothing: give monitor=100"):
        GradientCentralization(None)
    with pytest.raises(ValueError, match="strength: has no effect with placement=None"):
        GradientCentralization(None, strength=0.5, monitor=100)

    model = module()
    model.configure_optimizers = lambda: None
    with (
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(ValueError, match="the LightningModule has no optimizers"),
    ):
        fit(model, GradientCentralization())

    with pytest.raises(ValueError, match=r"gradcentral.AdamW already centers: .*placement=None, monitor=100"):
        fit(module(gradcentral.AdamW), GradientCentralization())
    fit(module(gradcentral.AdamW), GradientCentralization(placement=None, monitor=100))

    with pytest.raises(ValueError, match="submodule: Classifier has no 'encoder'; choose from net"):
        fit(module(), GradientCentralization(submodule="encoder"))
    fit(module(), GradientCentralization(submodule="net"))

    gan: Any = Gan()
    gan.configure_optimizers = lambda: [Adam(gan.generator.parameters())]
    with pytest.raises(ValueError, match="submodule: no optimizer .* holds a parameter of 'discriminator'"):
        fit(gan, GradientCentralization(submodule="discriminator"))

    with pytest.raises(ValueError, match="unknown placement 'both'"):
        GradientCentralization("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength must be"):
        GradientCentralization(strength=2.0)
    with pytest.raises(ValueError, match="unknown only='linear'; choose from 'all', 'conv'"):
        GradientCentralization(only="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="monitor must be the number of steps per record, such as monitor=100"):
        GradientCentralization(monitor=0)
    with pytest.raises(ValueError, match=r"exclude: 'head.\*' matches no parameter"):
        fit(module(), GradientCentralization(exclude=["head.*"]))


def test_two_callbacks_for_the_same_network_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `GradientCentralization`"):
        lightning.Trainer(callbacks=[GradientCentralization(), GradientCentralization("update")], logger=False)
