"""Character language models of The Devil's Dictionary: a transformer with LayerNorm or RMSNorm, and a GRU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gradcentral.experiment.task import Task
from gradcentral.experiment.tasks.metrics import bits_per_character, character_loss
from gradcentral.experiment.tasks.networks import TransformerBlock
from gradcentral.experiment.tasks.optimizers import optimizers, tuned, warm_up_then_cosine
from gradcentral.experiment.tasks.sources import devils_dictionary

__all__ = ["CharacterGRU", "CharacterTransformer", "tasks"]

LENGTH, TRAIN_WINDOWS, TEST_WINDOWS = 48, 2048, 256


class CharacterTransformer(nn.Module):
    """A causal pre-norm transformer with two blocks: characters ``[n, length]`` to logits ``[n, length, alphabet]``."""

    def __init__(self, norm: type[nn.Module], alphabet: int, width: int = 32) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(alphabet, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, norm, causal=True) for _ in range(2)))
        self.norm, self.head = norm(width), nn.Linear(width, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(text) + self.positions.weight)))
        return logits


class CharacterGRU(nn.Module):
    """One GRU layer: characters ``[n, length]`` to logits ``[n, length, alphabet]``."""

    def __init__(self, alphabet: int, width: int = 48) -> None:
        super().__init__()
        self.characters, self.gru = nn.Embedding(alphabet, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.characters(text))[0])
        return logits


def windows() -> tuple[TensorDataset, TensorDataset, int]:
    """Cut the text into windows with their next characters: from its beginning to train, from its end to test."""
    text = devils_dictionary()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    pairs = codes[: (len(codes) - 1) // LENGTH * LENGTH + 1]
    inputs, targets = pairs[:-1].reshape(-1, LENGTH), pairs[1:].reshape(-1, LENGTH)
    train = TensorDataset(inputs[:TRAIN_WINDOWS], targets[:TRAIN_WINDOWS])
    return train, TensorDataset(inputs[-TEST_WINDOWS:], targets[-TEST_WINDOWS:]), len(alphabet)


_train, _test, _alphabet = windows()
_models: dict[str, Callable[[], nn.Module]] = {
    "text-layernorm": partial(CharacterTransformer, nn.LayerNorm, _alphabet),
    "text-rmsnorm": partial(CharacterTransformer, nn.RMSNorm, _alphabet),
    "text-gru": partial(CharacterGRU, _alphabet),
}
tasks = {
    name: Task(
        name=name,
        model=model,
        train=_train,
        test=_test,
        loss=character_loss,
        metric=bits_per_character,
        optimizers=optimizers(tuned(name)),
        schedule=warm_up_then_cosine,
        batch_size=32,
        epochs=4,
        higher_is_better=False,
    )
    for name, model in _models.items()
}
