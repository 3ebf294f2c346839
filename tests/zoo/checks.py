"""Checks for every architecture: each parameter is classified as in the library's source, and GC freezes none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradcentral import WeightVectors, centralize, weight_layout

Vectors: TypeAlias = "tuple[int, ...] | WeightVectors"
Expected: TypeAlias = "str | Vectors | Callable[[Any], Vectors]"
"""The axes of a weight vector, possibly depending on the module, or part of the reason for skipping it."""


class Architecture(NamedTuple):
    """A model, a forward pass, and the expectations for parameters that do not belong to standard layers."""

    name: str
    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module], Any]
    special: Mapping[str, Expected] = {}


def library(name: str) -> Any:
    """Import the library, or skip the tests of this file with a message that explains how to run them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {name}: pip install 'gradcentral[zoo]'", exc_type=ImportError)


def check_classified(architecture: Architecture) -> None:
    """Compare the whole layout with the expectations, which cover every parameter outside the layers of torch.nn."""
    model = build(architecture)
    _run(architecture, model)  # initializes lazy parameters
    layout = weight_layout(model)
    assert [entry.name for entry in layout.unknown] == []
    unused = set(architecture.special)
    for entry in layout.entries:
        patterns = [pattern for pattern in architecture.special if fnmatchcase(entry.name, pattern)]
        unused -= set(patterns)
        expected = architecture.special[patterns[0]] if patterns else _standard(model, entry.name, entry.parameter)
        if callable(expected):
            expected = expected(model.get_submodule(entry.name.rpartition(".")[0]))
        if isinstance(expected, str):
            assert entry.vectors is None, f"{entry.name} should be skipped ({expected})"
            assert expected in entry.reason, entry.name
        else:
            vectors = expected if isinstance(expected, WeightVectors) else WeightVectors(expected)
            assert entry.vectors is not None, f"{entry.name} is skipped: {entry.reason}"
            assert entry.vectors == vectors.for_shape(entry.parameter.shape), entry.name
    assert not unused, f"expectations for parameters that the model does not have: {unused}"


def check_moves(architecture: Architecture) -> None:
    """Check that every parameter with a gradient is still updated when gradients are centered."""
    model = build(architecture)
    _run(architecture, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    centralize(optimizer, model)
    torch.autograd.backward(_loss(_run(architecture, model)))
    reached = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-8
    }
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(reached) > len(before) / 4 or any(not p.requires_grad for p in model.parameters())
    assert reached - moved == set()


def build(architecture: Architecture) -> nn.Module:
    """Build the model in float64, with noise added to its initial weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only warnings of the libraries; gradcentral's own are tested elsewhere
        model = architecture.make()
        # Zero initialization (of the last layer of a branch) would keep gradients from reaching other layers.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and not isinstance(parameter, nn.UninitializedParameter):
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double().train()


def _run(architecture: Architecture, model: nn.Module) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return architecture.forward(model)


def _loss(output: Any) -> Tensor:
    """Return a scalar to which every floating-point tensor of an output contributes."""
    if isinstance(output, Tensor):
        if not output.is_floating_point() or output.grad_fn is None:
            return torch.zeros((), dtype=torch.float64)
        weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
        return (output * weights).sum() + output.square().sum()
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return sum((_loss(part) for part in parts), torch.zeros((), dtype=torch.float64))


def _standard(model: nn.Module, name: str, parameter: Tensor) -> Expected:
    """Return the expectation for a layer of torch.nn, independently of the rule tables."""
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    if parameter.ndim <= 1:
        return ""
    if local == "weight":
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "lookup"
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)):
            return "normalization"
        if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):
            if parameter[0].numel() == 1:
                return "fan-in 1"
            return tuple(range(1, parameter.ndim))
        if isinstance(module, _ConvTransposeNd) and module.groups == max(module.stride) == 1:
            return (0, *range(2, parameter.ndim))
    if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
        return (1,)
    raise AssertionError(f"{name} of {type(module).__name__} does not belong to a standard layer: add an expectation")
