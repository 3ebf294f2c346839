"""`LightningCLI`: the callback from a configuration file, and gradcentral's optimizers by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gradcentral
from tests.integrations import hand_written
from tests.integrations.hand_written import adamw, batches, difference, network
from tests.integrations.lightning_runs import PACKAGES, QUIET, loader

pytest.importorskip("lightning.pytorch", reason="needs lightning: run `make trainers`")
pytest.importorskip("jsonargparse", reason="needs jsonargparse: run `make trainers`")

from lightning.pytorch.cli import OptimizerCallable

pytestmark = QUIET
ROUNDING = 1e-6
TRAINER = ["accelerator=cpu", "max_epochs=1", "logger=false", "enable_checkpointing=false"]
TRAINER += ["enable_progress_bar=false", "enable_model_summary=false"]
CONFIGURATION = """
trainer:
  callbacks:
    - class_path: gradcentral.integrations.lightning.GradientCentralization
      init_args:
        placement: update
        exclude: ["net.3.*"]
        overrides: {net.0.weight: "[o] i k k"}
        monitor: 4
"""


def run(package: str, *arguments: str, **options: Any) -> Any:
    """Fit with a command line of a package, and return its `LightningCLI`; the module takes an optimizer."""
    library: Any = importlib.import_module(package)

    class Classifier(library.LightningModule):  # type: ignore[misc]
        def __init__(self, optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.1)) -> None:
            super().__init__()
            self.net = network()
            self.create = optimizer

        def training_step(self, batch: Any, _: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    if not options.get("auto_configure_optimizers", True):
        Classifier.configure_optimizers = lambda module: module.create(module)

    class Data(library.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return loader()

    command = ["fit", *arguments, *(f"--trainer.{option}" for option in TRAINER)]
    cli = importlib.import_module(f"{package}.cli").LightningCLI
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *command])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of jsonargparse
        return cli(Classifier, Data, save_config_callback=None, seed_everything_default=False, **options)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_callback_in_a_configuration_file(package: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    optimizer = ("--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    trained = run(package, "--config", str(tmp_path / "config.yaml"), *optimizer)
    callback = next(one for one in trained.trainer.callbacks if type(one).__name__ == "GradientCentralization")
    # The pattern centers over the four filters instead of within each.
    assert [str(v.pattern) for v in callback.handle.layout.values()] == ["[o] i k k"]
    moved = trained.model.net[0].weight - network()[0].weight
    assert moved.abs().max() > 1e-3
    assert moved.mean(0).abs().max() < ROUNDING
    assert [record.step for record in callback.monitors[0].records] == [0, 4]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_callback_on_the_command_line(package: str) -> None:
    name = "gradcentral.integrations.lightning.GradientCentralization"
    arguments = (f"--trainer.callbacks={name}", "--trainer.callbacks.placement=update")
    trained = run(
        package, *arguments, "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--optimizer.weight_decay=0.1"
    )
    by_hand = hand_written.train(network(), batches(), adamw, "update")
    assert difference(trained.model.net, by_hand) < ROUNDING


@pytest.mark.parametrize("package", PACKAGES)
def test_an_optimizer_of_gradcentral_finds_the_layers_of_the_parameters_that_it_receives(package: str) -> None:
    options = ("gradcentral.AdamW", "lr=0.01", "weight_decay=0.1", "placement=update")
    by_hand = hand_written.train(network(), batches(), adamw, "update")
    first, *others = options
    trained = run(package, f"--optimizer={first}", *(f"--optimizer.{other}" for other in others))
    assert isinstance(trained.trainer.optimizers[0], gradcentral.AdamW)
    assert difference(trained.model.net, by_hand) < ROUNDING

    arguments = (f"--model.optimizer={first}", *(f"--model.optimizer.{other}" for other in others))
    trained = run(package, *arguments, auto_configure_optimizers=False)
    assert isinstance(trained.trainer.optimizers[0], gradcentral.AdamW)
    assert difference(trained.model.net, by_hand) < ROUNDING


def test_the_command_line_refuses_an_unknown_placement(capsys: pytest.CaptureFixture[str]) -> None:
    name = "gradcentral.integrations.lightning.GradientCentralization"
    with pytest.raises(SystemExit):
        run(PACKAGES[0], f"--trainer.callbacks={name}", "--trainer.callbacks.placement=both")
    assert "Expected a typing.Literal['gradient', 'regularized', 'update']" in capsys.readouterr().err
