"""Networks pretrained on eight classes of Fashion-MNIST, for the tasks that fine-tune them to the other two."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from gradcentral.experiment.determinism import one_thread
from gradcentral.experiment.tasks.networks import PatchTransformer, ResNet
from gradcentral.experiment.tasks.optimizers import warm_up_then_cosine
from gradcentral.experiment.tasks.sources import fashion_mnist

__all__ = ["IMAGES", "NEW", "pretrained"]

NEW = (2, 6)
"""The classes that are left out: pullover and shirt, which are hard to tell apart."""
IMAGES = 2048
"""The number of training images, from which the examples of the new classes are taken too."""


@functools.cache
def pretrained(kind: str) -> nn.Module:
    """Train a network on the eight classes; the same in every process, and without drawing from global generators."""
    images, classes = fashion_mnist("train", IMAGES)
    old = ~torch.isin(classes, torch.tensor(NEW))
    images, classes = images[old], classes[old]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet("batchnorm") if kind == "resnet" else PatchTransformer(10)
        epochs = 6 if kind == "resnet" else 12
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = warm_up_then_cosine(optimizer, epochs * (len(images) // 64))
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(images)), 64)[: len(images) // 64]:
                optimizer.zero_grad()
                functional.cross_entropy(model(images[batch]), classes[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model
