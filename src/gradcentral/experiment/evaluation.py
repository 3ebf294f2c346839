"""Evaluate a model on a test set: the mean loss, and the metric of all outputs and targets together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcentral.experiment.errors import TaskError

__all__ = ["join", "number", "on_cpu"]


def number(name: str, value: Any) -> float:
    """Convert what a loss or metric returned; raise a `TaskError` that names it unless that is a single number."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = getattr(value, "shape", None)
        found = f"a {type(value).__name__}" if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"
        hint = "; return its mean()" if shape else ""
        raise TaskError(f"{name}: must return a single number, not {found}{hint}") from error


def on_cpu(value: Any) -> Any:
    """Copy the tensors of a batch or an output to the CPU, where they may outlive many batches."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return _like(value, {key: on_cpu(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return _like(value, [on_cpu(item) for item in value])
    return value


class UnjoinedBatches(list[Any]):
    """The tensors of several batches with different shapes; a metric that does not need them may ignore them."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"no {name!r}, because the test batches have different shapes and cannot be joined; pad them to one shape, "
            "or set metric_per_batch=True"
        )


def join(name: str, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join what several batches of these sizes gave into one batch of the whole set.

    Tensors are concatenated along their first axis. Mappings, and tuples and lists of tensors, are joined item by item.
    A list with one item per example (text, or the dictionaries of an object detector) becomes one list.

    >>> join("target", [{"x": torch.ones(2), "name": ["a", "b"]}, {"x": torch.ones(1), "name": ["c"]}], [2, 1])
    {'x': tensor([1., 1., 1.]), 'name': ['a', 'b', 'c']}
    """
    joined = _joined(parts, sizes)
    if isinstance(parts[0], Tensor) and not isinstance(joined, Tensor):
        one, other = parts[0], next(part for part in parts if part.shape[1:] != parts[0].shape[1:])
        raise TaskError(
            f"metric: the {name}s of the test batches have the shapes {tuple(one.shape)} and {tuple(other.shape)} and "
            "cannot be joined; pad them to one shape, or set metric_per_batch=True"
        )
    return joined


def _joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, Tensor) for part in parts):
        if all(part.ndim == 0 for part in parts):
            return torch.stack([*parts])
        return torch.cat([*parts]) if len({part.shape[1:] for part in parts}) == 1 else UnjoinedBatches(parts)
    if isinstance(first, Mapping):
        return _like(first, {key: _joined([part[key] for part in parts], sizes) for key in first})
    if isinstance(first, (list, tuple)):
        if _one_item_per_example(parts, sizes):
            return [item for part in parts for item in part]
        return _like(first, [_joined(items, sizes) for items in zip(*parts, strict=True)])
    return None if first is None else [*parts]


def _one_item_per_example(parts: Sequence[Any], sizes: Sequence[int]) -> bool:
    if len({len(part) for part in parts}) > 1:
        return True
    if any(isinstance(item, (str, bytes, int, float, Mapping)) for item in parts[0]):
        return True
    batches = [*zip(parts, sizes, strict=True)]
    columns = all(not isinstance(x, Tensor) or x.shape[:1] == (size,) for part, size in batches for x in part)
    return not columns and all(len(part) == size for part, size in batches)


def _like(value: Any, items: Any) -> Any:
    """Build a container of the same type, such as a named tuple or an output of transformers."""
    make = getattr(value, "_make", type(value))
    try:
        return make(items)
    except (TypeError, ValueError):
        return items
