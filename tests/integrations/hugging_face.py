"""A GPT-2 of one layer with random weights, its data, and its training by a Trainer and by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.torchvision_operators import declare_operators

declare_operators()  # also in processes that pytest does not start

import transformers  # noqa: E402

__all__ = ["BLOCKS", "build", "center_by_hand", "data", "drift", "means", "train_by_hand", "trainer"]

_CENTERED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BLOCKS = 32
"""Blocks of 8 tokens in the data."""


def build(**options: Any) -> Any:
    """Create the model, with the same weights in each call."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**size, **rest, **options}))
    model.loss_type = "ForCausalLM"  # so that the Trainer divides the loss by the number of predicted tokens
    for block in model.transformer.h:
        # Inputs whose mean is not zero, so that centering removes a large part of the gradients.
        nn.init.ones_(block.ln_1.bias)
        nn.init.ones_(block.ln_2.bias)
    return model


def data() -> list[dict[str, Tensor]]:
    """Return blocks of tokens, for a Trainer."""
    tokens = torch.randint(0, 50, (BLOCKS, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": block, "labels": block} for block in tokens]


def center_by_hand(model: nn.Module, strength: float = 1.0) -> None:
    """Subtract the means of the gradients over the inputs, which are the first axis of GPT-2's Conv1D."""
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f"{layer}.weight" for layer in _CENTERED)):
            assert parameter.grad is not None
            parameter.grad -= strength * parameter.grad.mean(0, keepdim=True)


def trainer(
    folder: Path,
    model: Any,
    *callbacks: transformers.TrainerCallback,
    init: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Create a Trainer of a model, or of what a function returns, whose steps `train_by_hand` can repeat.

    Args:
        folder: for checkpoints.
        model: a model, or a function for ``model_init``.
        callbacks: for the Trainer.
        init: more arguments of the Trainer.
        arguments: TrainingArguments other than those below.
    """
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.1,
        **arguments,
    }
    created = {"model": model} if isinstance(model, torch.nn.Module) else {"model_init": model}
    return transformers.Trainer(
        **created,
        args=transformers.TrainingArguments(**options),
        train_dataset=data(),
        callbacks=[*callbacks],
        **init or {},
    )


def train_by_hand(
    model: Any,
    *,
    steps: int,
    skip: int = 0,
    batch: int = 4,
    accumulate: int = 1,
    clip: float | None = None,
    center: Callable[[nn.Module], None] | None = center_by_hand,
    clip_last: bool = False,
    create: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = lambda params: torch.optim.SGD(params, lr=0.1),
    autocast: bool = False,
) -> Any:
    """Train on consecutive batches: accumulate, clip, center, step.

    Args:
        model: it is changed, and returned.
        steps: number of steps.
        skip: number of steps whose batches are left out at the beginning.
        batch: blocks per batch.
        accumulate: batches per step.
        clip: largest norm of the gradients.
        center: what centers the gradients.
        clip_last: clip after centering.
        create: creates the optimizer.
        autocast: compute in bfloat16.
    """
    optimizer, blocks = create(model.parameters()), data()
    model.train()
    batches = iter([blocks[at : at + batch] for at in range(0, BLOCKS, batch)][skip * accumulate :])
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            tokens = torch.stack([block["input_ids"] for block in next(batches)])
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = model(input_ids=tokens, labels=tokens).loss
            (loss / accumulate).backward()
        if clip is not None and not clip_last:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if center is not None:
            center(model)
        if clip is not None and clip_last:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def means(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean of each weight vector, by the name of the layer."""
    return {
        name: parameter.detach().double().mean(0)
        for name, parameter in model.named_parameters()
        if name.endswith(tuple(f"{layer}.weight" for layer in _CENTERED))
    }


def drift(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest change of the means since ``before``, by the name of the layer."""
    return {name: (now - before[name]).abs().max().item() for name, now in means(model).items()}
