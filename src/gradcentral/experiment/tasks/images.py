"""Fashion-MNIST at 16×16 pixels: a small residual network in four norms, and an autoencoder."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import accuracy, squared_error
from gradcentral.experiment.tasks.networks import NORMS, ResNet
from gradcentral.experiment.tasks.optimizers import optimizers, tuned, warm_up_then_cosine
from gradcentral.experiment.tasks.sources import fashion_mnist

__all__ = ["autoencoder", "tasks"]

TRAIN_SIZE, TEST_SIZE = 1536, 1000


def autoencoder() -> nn.Module:
    """Build two convolutions, a code of 32 numbers and two transposed convolutions: ``[n, 1, 16, 16]`` to itself."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Linear(32, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4))),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)),
    )


(train_images, train_classes), (test_images, test_classes) = (
    fashion_mnist(part, count) for part, count in (("train", TRAIN_SIZE), ("t10k", TEST_SIZE))
)

tasks = {
    f"fashion-{norm}": Task(
        name=f"fashion-{norm}",
        model=partial(ResNet, norm),
        train=TensorDataset(train_images, train_classes),
        test=TensorDataset(test_images, test_classes),
        loss=functional.cross_entropy,
        metric=accuracy,
        optimizers=optimizers(tuned(f"fashion-{norm}")),
        schedule=warm_up_then_cosine,
        batch_size=64,
        epochs=6,
    )
    for norm in NORMS
}
tasks["autoencoder"] = Task(
    name="autoencoder",
    model=autoencoder,
    train=TensorDataset(train_images, train_images),
    test=TensorDataset(test_images, test_images),
    loss=functional.mse_loss,
    metric=squared_error,
    optimizers=optimizers(tuned("autoencoder")),
    schedule=warm_up_then_cosine,
    batch_size=64,
    epochs=6,
    higher_is_better=False,
)
