"""Section 4.1 of the paper, after training: the means of the weight vectors in a file of trained weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcentral.experiment.errors import TaskError
from gradcentral.extras import optional
from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import double_rows
from gradcentral.projection import positive_or_one
from gradcentral.weight_vectors import WeightVectors

__all__ = ["means_of", "read_weights"]

# Put in front of every name by DistributedDataParallel, torch.compile and trainers that hold the model.
_PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|model)\.)+")
_SHOWN = 3


def means_of(weights: Mapping[str, Tensor], vectors: Mapping[str, WeightVectors]) -> dict[str, Tensor]:
    """Compute |mean(w)| of every weight vector, and |mean(w)| in units of σ/√M.

    σ is the standard deviation of a parameter's weights. If they were independent, as before training, their means
    would have the standard deviation σ/√M.

    Args:
        weights: the parameters by name.
        vectors: the weight vectors of each of them.
    """
    absolute, relative = [], []
    for name, found in vectors.items():
        rows = double_rows(weights[name], found).cpu()
        means = rows.mean(1).abs()
        sigma = (rows - rows.mean()).abs().square().mean().sqrt()
        absolute.append(means)
        relative.append(means / positive_or_one(sigma / math.sqrt(found.fan_in)))
    return {"absolute": torch.cat(absolute), "relative": torch.cat(relative)}


def read_weights(path: Path, layout: WeightLayout) -> dict[str, Tensor]:
    """Read the centered parameters of a model from a file, by their names in the layout.

    The file holds a state dict, as safetensors or as saved by ``torch.save``. It may be an entry of a checkpoint, and
    its names may have the prefixes of wrappers. Only tensors are read: code in the file is never executed.

    Raises:
        TaskError: the file cannot be read; it lacks a parameter; one has another shape, or no finite numbers.
    """
    entries = [entry for entry in layout.entries if entry.vectors is not None]
    names = {name for entry in entries for name in (entry.name, *entry.aliases)}
    best = max(_state_dicts(_load(path)), key=lambda tensors: len(names & tensors.keys()), default=None)
    if best is None:
        raise TaskError(f"weights: {path} holds no tensors by name; save model.state_dict()")
    found: dict[str, Tensor] = {}
    for entry in entries:
        tensor = next((best[name] for name in (entry.name, *entry.aliases) if name in best), None)
        if tensor is None:
            raise TaskError(f"weights: {path} lacks {entry.name} of the task's model; it has {_some(best)}")
        if tensor.shape != entry.parameter.shape:
            one, other = ("×".join(map(str, shaped.shape)) for shaped in (tensor, entry.parameter))
            raise TaskError(f"weights: {entry.name} is {one} in {path}, but {other} in the task's model")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TaskError(f"weights: {entry.name} in {path} has dtype {tensor.dtype}, which has no mean")
        if not (tensor if tensor.is_complex() else tensor.double()).isfinite().all():
            raise TaskError(f"weights: {entry.name} in {path} has values that are not finite")
        found[entry.name] = tensor
    return found


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return optional("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TaskError(f"weights: {path} cannot be read: {error.strerror or error}") from error
    except ImportError:
        raise
    except Exception as error:  # each format, and each version of it, has its own exceptions
        raise TaskError(
            f"weights: {path} is not a file of tensors ({type(error).__name__}); save model.state_dict() with "
            "torch.save, or with safetensors in a file that ends in .safetensors"
        ) from error


def _state_dicts(content: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the mappings from names to tensors in a file, with their names as they are, then without prefixes."""
    if isinstance(content, Mapping):
        for mapping in (content, *content.values()):
            if isinstance(mapping, Mapping):
                tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
                if tensors:
                    yield tensors
                    yield {_PREFIXES.sub("", name): value for name, value in tensors.items()}


def _some(names: Mapping[str, Any]) -> str:
    more = len(names) - _SHOWN
    return ", ".join([*names][:_SHOWN]) + (f" and {more} more" if more > 0 else "")
