"""Results do not depend on torch's default device and default dtype."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradcentral
from gradcentral.experiment import Task
from tests.test_imports import PACKAGE

F32: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
OPTIMIZERS: dict[str, Any] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    with torch.device(device):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def network(seed: int = 0) -> nn.Module:
    """Rows, columns, a strided transposed convolution, and parameters that are not centered."""
    layers = [
        nn.Linear(6, 8, **F32),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 3, 3, **F32),
        nn.ConvTranspose2d(3, 2, 2, stride=2, **F32),
        nn.Flatten(),
        nn.Linear(128, 2, **F32),
    ]
    generator = torch.Generator("cpu").manual_seed(seed)
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, **F32) * 0.3)
    return net


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.rand(count, 6, generator=generator, **F32), torch.rand(count, 2, generator=generator, **F32)


def trained(make: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Train for three steps; return the weights and the optimizer's state."""
    net = network()
    optimizer = make(net)
    x, y = examples(16)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    found: dict[str, Tensor] = dict(net.named_parameters())
    for index, state in enumerate(optimizer.state.values()):
        found |= {f"state {index} {key}": value for key, value in state.items() if key != "step"}
    return found


def attached(name: str, placement: str, net: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(net.parameters(), **OPTIMIZERS[name])
    gradcentral.centralize(optimizer, net, placement)
    return optimizer


def steps() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, options in OPTIMIZERS.items():
        for placement in ("gradient", "update"):
            ours = partial(getattr(gradcentral, name), placement=placement, **options)
            runs: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
                "attached": partial(attached, name, placement),
                "fused": ours,
                "unfused": partial(ours, fused=False),
            }
            for route, make in runs.items():
                found |= {f"{name} {placement} {route} {key}": value for key, value in trained(make).items()}
    return found


def gradients() -> dict[str, Tensor]:
    net = network()
    x, y = examples(16)
    nn.functional.mse_loss(net(x), y).backward()
    gradcentral.centralize_gradients(net)
    found: dict[str, Tensor] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    found["center"] = gradcentral.center(x, "o [i]")
    found["share"] = gradcentral.share(x, "o [i]")
    gradcentral.center_weights_(net)
    return found | {f"initial {name}": p for name, p in net.named_parameters()}


def probed() -> str:
    report = gradcentral.probe(network(), nn.functional.mse_loss, [examples(16)])
    return str(report)


def monitored() -> list[str]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = examples(16)
    with gradcentral.Monitor(net, optimizer, every=1) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    return [record.to_line() for record in monitor.records]


def compared() -> list[Any]:
    task = Task(
        name="tiny",
        model=network,
        train=TensorDataset(*examples(24)),
        test=TensorDataset(*examples(12)),
        loss=nn.functional.mse_loss,
        metric=lambda output, target: (output - target).abs().mean(),
        optimizers={"sgd": lambda params: torch.optim.SGD(params, lr=0.05)},
        batch_size=8,
        epochs=1,
        higher_is_better=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = gradcentral.compare(task, seeds=2, jobs=1, out=Path(folder), progress=False)
    return [(run.arm, run.seed, run.weights, run.epochs) for run in result.all_runs]


CORE: list[Callable[[], Any]] = [steps, gradients, probed, monitored, compared]


@pytest.mark.parametrize("core", CORE, ids=lambda core: core.__name__)
@pytest.mark.parametrize(
    "defaults",
    [
        pytest.param(lambda: default_device("meta"), id="meta"),
        pytest.param(lambda: default_dtype(torch.float64), id="float64"),
        pytest.param(lambda: default_dtype(torch.bfloat16), id="bfloat16"),
    ],
)
def test_default_device_and_dtype_change_nothing(core: Callable[[], Any], defaults: Callable[[], Any]) -> None:
    """The device "meta" stands for any other than that of the tensors: memory on it cannot be read or written."""
    expected = core()
    with defaults():
        if core is steps and torch.get_default_device().type == "meta" and torch.__version__ < "2.9":
            pytest.skip("torch 2.8's own Adam counts its steps in a tensor on the default device, with or without GC")
        found = core()
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].device, found[name].dtype) == (value.device, value.dtype), name
            assert torch.equal(found[name], value), name
    else:
        assert found == expected


ALLOCATIONS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros"}
RANDOM = {"rand", "randint", "randn", "randperm"}


def test_every_allocation_names_its_device() -> None:
    """Memory of the default device may be unreadable where it is used, and its dtype may be too narrow."""
    found, missing = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "tasks":  # written like a user's own files, which use the defaults
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", "") != "torch" or node.func.attr not in ALLOCATIONS | RANDOM:
                continue
            found += 1
            given = {keyword.arg for keyword in node.keywords}
            if "device" not in given and None not in given:
                missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found > 15
    assert not missing
