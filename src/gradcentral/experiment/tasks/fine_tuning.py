"""Fine-tuning of networks pretrained on eight classes of Fashion-MNIST to the other two, with 32 examples of each."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import accuracy
from gradcentral.experiment.tasks.networks import PatchTransformer, ResNet, add_lora
from gradcentral.experiment.tasks.optimizers import optimizers, tuned, warm_up_then_cosine
from gradcentral.experiment.tasks.pretraining import IMAGES, NEW, pretrained
from gradcentral.experiment.tasks.sources import fashion_mnist

__all__ = ["tasks", "with_new_head"]

EXAMPLES, TEST = 32, 2000


def _new(part: str, searched: int, count: int) -> TensorDataset:
    """Return the first examples of both new classes, numbered 0 and 1, among the first ``searched`` images."""
    images, classes = fashion_mnist(part, searched)
    chosen = torch.cat([(classes == new).nonzero()[:count, 0] for new in NEW])
    return TensorDataset(images[chosen], (classes[chosen] == NEW[1]).long())


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
        train=_new("train", IMAGES, EXAMPLES),
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
