"""Fine-tuning of networks pretrained on eight classes of Fashion-MNIST to the other two, with 32 examples of each."""

from __future__ import annotations

import copy
import functools
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradcentral.experiment.determinism import one_thread
from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import accuracy
from gradcentral.experiment.tasks.networks import PatchTransformer, ResNet, add_lora
from gradcentral.experiment.tasks.optimizers import optimizers, tuned, warm_up_then_cosine
from gradcentral.experiment.tasks.sources import fashion_mnist

__all__ = ["pretrained", "tasks"]

NEW = (2, 6)
"""Pullover and shirt, which are hard to tell apart."""
EXAMPLES, PRETRAINING, TEST = 32, 2048, 2000


def _new(part: str, searched: int, count: int) -> TensorDataset:
    """Return the first examples of both new classes, numbered 0 and 1, among the first ``searched`` images."""
    images, classes = fashion_mnist(part, searched)
    chosen = torch.cat([(classes == new).nonzero()[:count, 0] for new in NEW])
    return TensorDataset(images[chosen], (classes[chosen] == NEW[1]).long())


@functools.cache
def pretrained(kind: str) -> nn.Module:
    """Train a network on the eight classes; the same in every process, and without drawing from global generators."""
    images, classes = fashion_mnist("train", PRETRAINING)
    old = ~torch.isin(classes, torch.tensor(NEW))
    images, classes = images[old], classes[old]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet("batchnorm") if kind == "resnet" else PatchTransformer(10)
        epochs = 6 if kind == "resnet" else 12
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = warm_up_then_cosine(optimizer, epochs * (len(images) // 64))
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
                optimizer.zero_grad()
                functional.cross_entropy(model(images[batch]), classes[batch]).backward()
                optimizer.step()
                schedule.step()
    return model


def with_new_head(kind: str) -> nn.Module:
    """Return a copy of a pretrained network with a new head for two classes; with LoRA for the transformer."""
    model = copy.deepcopy(pretrained(kind))
    assert isinstance(model, (ResNet, PatchTransformer))
    features = model.head.in_features
    if kind == "transformer":
        model.head = nn.Identity()  # type: ignore[assignment]
        add_lora(model, rank=4)
    model.head = nn.Linear(features, 2)
    return model


tasks = {
    name: Task(
        name=name,
        model=partial(with_new_head, kind),
        train=_new("train", PRETRAINING, EXAMPLES),
        test=_new("t10k", TEST, TEST),
        loss=functional.cross_entropy,
        metric=accuracy,
        optimizers=optimizers(tuned(name)),
        schedule=warm_up_then_cosine,
        batch_size=8,
        epochs=10,
    )
    for name, kind in (("fine-tuning", "resnet"), ("lora", "transformer"))
}
