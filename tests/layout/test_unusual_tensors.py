"""Parameters of types that cannot be centered are skipped with a reason, and frozen ones are never touched."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral import weight_layout

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


class Packed(Tensor):
    """Stored as int8, presented as float32; it implements very few operators, like many quantized tensors."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Packed(args[0].codes)
        raise NotImplementedError(f"Packed does not implement {func}")


class Wrapped(Packed):
    """Like Packed, with all operators of the dequantized tensor."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Wrapped(args[0].codes)
        plain = [a.codes.float() if isinstance(a, Wrapped) else a for a in args]
        return func(*plain, **(kwargs or {}))


def _ones(dtype: str) -> Tensor:
    return torch.ones(8, 8).to(getattr(torch, dtype))


CODES = torch.ones(8, 8, dtype=torch.int8)
TENSORS: dict[str, tuple[Any, str]] = {
    **{name: (partial(_ones, name), f"dtype {name} has no mean") for name in FLOAT8},
    "float4": (lambda: CODES.view(torch.float4_e2m1fn_x2), "dtype float4_e2m1fn_x2 has no mean"),
    "int8": (lambda: CODES.clone(), "dtype int8 has no mean"),
    "CSR": (lambda: torch.eye(8).to_sparse_csr(), "sparse_csr layout"),
    "CSC": (lambda: torch.eye(8).to_sparse_csc(), "sparse_csc layout"),
    "COO": (lambda: torch.eye(8).to_sparse(), "sparse_coo layout"),
    "packed": (lambda: Packed(CODES), "Packed does not implement the mean"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")


class Adapted(nn.Module):
    """A frozen base layer and a path that trains; the optimizer receives all parameters."""

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.base.weight = nn.Parameter(base, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.adapter(x)
        return output


@pytest.mark.parametrize("kind", TENSORS)
def test_the_layout_gives_the_reason(kind: str) -> None:
    make, reason = TENSORS[kind]
    layout = weight_layout(Adapted(make()))
    assert layout.skipped["base.weight"].startswith(reason)
    assert [layout.names[p] for p in layout] == ["adapter.weight"]
    by_shape = gradcentral.WeightLayout.from_shapes([("base", nn.Parameter(make(), requires_grad=False))])
    assert by_shape.skipped["base"].startswith(reason)


def test_subclasses_with_a_mean_are_centered() -> None:
    layout = weight_layout(Adapted(Wrapped(CODES)))
    assert [layout.names[p] for p in layout] == ["base.weight", "adapter.weight"]


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("fused", [False, True])
def test_training_beside_them_equals_training_without_them(kind: str, placement: str, fused: bool) -> None:
    results = []
    for base in (TENSORS[kind][0](), torch.ones(8, 8)):
        torch.manual_seed(0)
        model = Adapted(base)
        if fused:
            optimizer: torch.optim.Optimizer = gradcentral.AdamW(model, lr=0.1, placement=placement)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            gradcentral.centralize(optimizer, model, placement)
        with gradcentral.Monitor(model, optimizer, every=1) as monitor:
            model(torch.arange(16.0).reshape(2, 8)).square().sum().backward()
            optimizer.step()
        assert list(monitor.records[0].layers)[-1] == "adapter.weight"
        results.append(model.adapter.weight.detach())
    assert torch.equal(*results)


def test_frozen_parameters_are_not_touched_by_update() -> None:
    model = Adapted(torch.randn(8, 8))
    frozen = model.base.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradcentral.centralize(optimizer, model, "update")
    version = frozen._version
    means = model.adapter.weight.detach().mean(1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 8)).square().sum().backward()
        optimizer.step()
    assert frozen._version == version
    torch.testing.assert_close(model.adapter.weight.detach().mean(1), means)


def test_a_frozen_parameter_with_a_gradient_is_still_centered() -> None:
    """torch's optimizers update it, because they look at the gradient only."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradcentral.centralize(optimizer, model, "update")
    means = model.weight.detach().mean(1)
    model.weight.requires_grad_(False)
    model.weight.grad = torch.rand(8, 8)
    optimizer.step()
    torch.testing.assert_close(model.weight.mean(1), means)
