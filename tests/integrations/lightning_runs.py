"""Small modules and runs for the tests with Lightning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.hand_written import data, network, sgd

__all__ = ["LIGHTNING", "PACKAGES", "QUIET", "fit", "loader", "module"]

LIGHTNING = "lightning.pytorch"
PACKAGES = [LIGHTNING, "pytorch_lightning"]
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{beginning}")
    for beginning in (
        ".isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's own use of torch
        "The number of training batches .* is smaller than the logging interval",
        "The 'train_dataloader' does not have many workers",
        "GPU available but not used",
    )
]
"""Marks that ignore Lightning's remarks on small runs."""


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=8)


def module(optimizer: Callable[[Any], Optimizer] = sgd, package: str = LIGHTNING) -> Any:
    library: Any = importlib.import_module(package)

    class Classifier(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return optimizer(self.parameters())

    return Classifier()


def fit(
    model: Any,
    *callbacks: Any,
    package: str = LIGHTNING,
    ckpt_path: Any = None,
    batches: Any = None,
    **options: Any,
) -> Any:
    """Fit for one epoch, without output, and return the trainer."""
    trainer = importlib.import_module(package).Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )
    trainer.fit(model, loader() if batches is None else batches, ckpt_path=ckpt_path)
    return trainer
