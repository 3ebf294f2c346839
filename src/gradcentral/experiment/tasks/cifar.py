"""CIFAR-100 with ResNet-18 at the paper's settings: 200 epochs, which need a GPU and the user's copy of the data."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import accuracy
from gradcentral.experiment.tasks.networks import ResNet
from gradcentral.experiment.tasks.optimizers import PAPER_RATES, optimizers
from gradcentral.experiment.tasks.sources import cifar100_folder

__all__ = ["AugmentedBatches", "task"]

BATCH, EPOCHS = 128, 200


def load(part: str) -> tuple[Tensor, Tensor]:
    """Load ``"train"`` or ``"test"``: images ``[n, 3, 32, 32]``, standardized per channel, and the 100 fine classes."""
    with open(cifar100_folder() / part, "rb") as file:
        content = pickle.load(file, encoding="bytes")
    pixels = torch.as_tensor(content[b"data"]).reshape(-1, 3, 32, 32).float() / 255
    mean, std = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    return (pixels - mean[:, None, None]) / std[:, None, None], torch.as_tensor(content[b"fine_labels"])


class AugmentedBatches:
    """Shuffled batches of images, shifted by up to four pixels and flipped at random; a loader for a `Task`."""

    def __init__(self, images: Tensor, classes: Tensor, batch_size: int) -> None:
        self.images, self.classes, self.batch_size = images, classes, batch_size

    def __len__(self) -> int:
        return len(self.images) // self.batch_size  # without a smaller last batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.images.shape[-1]
        order = torch.randperm(len(self.images))[: len(self) * self.batch_size]
        for batch in torch.split(order, self.batch_size):
            rows, columns = torch.randint(9, (2, len(batch), 1)) + torch.arange(size)
            flipped = torch.rand(len(batch), 1) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
            padded = functional.pad(self.images[batch], (4, 4, 4, 4)).transpose(0, 1)
            which = torch.arange(len(batch))[:, None, None]
            shifted = padded[:, which, rows[:, :, None], columns[:, None, :]]
            yield shifted.transpose(0, 1), self.classes[batch]


def steps_of_the_paper(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Divide the learning rate by ten after 60, 120 and 180 of 200 epochs."""
    return MultiStepLR(optimizer, [steps * epoch // EPOCHS for epoch in (60, 120, 180)], gamma=0.1)


_images, _classes = load("train")
task = Task(
    name="cifar100",
    model=partial(ResNet, "batchnorm", classes=100, channels=3, widths=(64, 128, 256, 512), blocks=2),
    train=AugmentedBatches(_images, _classes, min(BATCH, len(_images))),
    test=TensorDataset(*load("test")),
    loss=functional.cross_entropy,
    metric=accuracy,
    optimizers=optimizers(PAPER_RATES),
    schedule=steps_of_the_paper,
    batch_size=BATCH,
    epochs=EPOCHS,
)
