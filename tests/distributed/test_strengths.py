"""Strengths of parameter groups on sharded parameters equal the reference on whole ones, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

import gradcentral
from gradcentral import center, weight_layout
from gradcentral.optim.reference import AdamState, adam_step, sgd_step
from gradcentral.targets import PLACEMENTS
from tests.distributed.test_placements import LAYOUTS, MESHES
from tests.distributed.workers import Workers

ADAM: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05, "eps": 1e-3}
SGD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
ON_TWO = [mesh for mesh, (shape, _) in MESHES.items() if shape == (2,)]
NAMES = [*LAYOUTS]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}


class Drawn(NamedTuple):
    """What the property test draws, in types that can be sent to another process."""

    mesh: str
    placement: str
    kind: str
    """``"SGD"`` or ``"Adam"``."""
    attached: bool
    dtype: str
    strengths: list[float]
    """Of the optimizer or handle, in each step."""
    settings: list[list[Any]]
    """The option "centralize" of the group of each layout, in each step."""
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Drawn:
    """Draw two steps."""
    part = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    option = st.sampled_from([None, True, False]) | part
    return Drawn(
        mesh=draw(st.sampled_from(ON_TWO)),
        placement=draw(st.sampled_from(PLACEMENTS)),
        kind=draw(st.sampled_from(["SGD", "Adam"])),
        attached=draw(st.booleans()),
        dtype=draw(st.sampled_from([*TOLERANCE])),
        strengths=[draw(part), draw(part)],
        settings=[[draw(part), *(draw(option) for _ in NAMES[1:])] for _ in range(2)],
        seed=draw(st.integers(0, 2**31)),
    )


def _optimizer(drawn: Drawn, groups: list[dict[str, Any]], layout: Any) -> Optimizer:
    gc: dict[str, Any] = {"layout": layout, "placement": drawn.placement, "strength": drawn.strengths[0]}
    options = SGD if drawn.kind == "SGD" else ADAM
    if not drawn.attached:
        own: Optimizer = getattr(gradcentral, drawn.kind)(groups, **options, **gc)
        return own
    optimizer: Optimizer = getattr(torch.optim, drawn.kind)(groups, **options)
    gradcentral.centralize(optimizer, **gc)
    return optimizer


def distances_from_the_reference(drawn: Drawn) -> dict[str, float]:
    """Take two steps on sharded parameters; return the largest differences on this rank, relative to the tolerance."""
    mesh_shape, placements = MESHES[drawn.mesh]
    mesh, dtype = init_device_mesh("cpu", mesh_shape), getattr(torch, drawn.dtype)
    numbers = torch.Generator().manual_seed(drawn.seed)

    def randn(name: str) -> Tensor:
        return torch.randn(*LAYOUTS[name][0], generator=numbers, dtype=torch.float64).to(dtype) + 0.5

    def placed(tensor: Tensor) -> Any:
        return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)

    expected = {name: randn(name) for name in NAMES}
    params = {name: nn.Parameter(placed(tensor)) for name, tensor in expected.items()}
    expected = {name: tensor.double() for name, tensor in expected.items()}
    overrides: dict[Any, Any] = {name: vectors for name, (_, vectors) in LAYOUTS.items()}
    model = nn.ParameterDict(params)
    groups: list[dict[str, Any]] = [{"params": [params[name]]} for name in NAMES]
    for group, setting in zip(groups, drawn.settings[0], strict=True):
        group |= {} if setting is None else {"centralize": setting}
    optimizer = _optimizer(drawn, groups, weight_layout(model, overrides=overrides))
    holder: Any = gradcentral.attached(optimizer)[0] if drawn.attached else optimizer
    states: dict[str, Any] = dict.fromkeys(NAMES)
    now: dict[str, Any] = dict.fromkeys(NAMES)
    for strength, settings_of_groups in zip(drawn.strengths, drawn.settings, strict=True):
        holder.strength = strength
        for group, name, setting in zip(optimizer.param_groups, NAMES, settings_of_groups, strict=True):
            if setting is not None:
                group["centralize"] = now[name] = setting
            chosen = now[name]
            s = strength if chosen is None else strength * chosen if isinstance(chosen, bool) else chosen
            gradient = randn(name)
            params[name].grad = placed(gradient)
            problem = (expected[name], gradient.double(), states[name], LAYOUTS[name][1], drawn.placement)
            if drawn.kind == "SGD":
                expected[name], states[name] = sgd_step(*problem, strength=s, **SGD)
            else:
                state = AdamState.zero(expected[name]) if states[name] is None else states[name]
                expected[name], states[name] = adam_step(*problem[:2], state, *problem[3:], strength=s, **ADAM)
        optimizer.step()
    found = {}
    for name, parameter in params.items():
        local: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        wanted = placed(expected[name]).to_local()
        distance = ((local.double() - wanted).abs() / (1 + wanted.abs())).max() if local.numel() else 0.0
        found[name] = float(distance) / TOLERANCE[drawn.dtype]
    return found


@settings(max_examples=15)
@given(drawn=draws())
def test_sharded_steps_of_any_strengths_equal_the_reference(two_ranks: Workers, drawn: Drawn) -> None:
    """Every layout in a group of its own; local and split weight vectors; the strengths change between the steps."""
    for distances in two_ranks.run(distances_from_the_reference, drawn):
        assert {name: distance for name, distance in distances.items() if not distance < 1} == {}


def all_reduces_of_a_step(strengths: list[Any]) -> int:
    """Return the number of all-reduces in a step of groups with these strengths, whose weight vectors are split."""
    mesh = init_device_mesh("cpu", (2,))
    _, placements = MESHES["columns on 2"]
    params = [nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, placements)) for _ in strengths]
    layout = weight_layout(nn.ParameterList(params), overrides={str(i): "o [i]" for i in range(len(params))})
    groups = [{"params": [p], "centralize": s} for p, s in zip(params, strengths, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    gradcentral.centralize(optimizer, layout=layout)
    for p in params:
        p.grad = distribute_tensor(torch.randn(4, 6), mesh, placements)
    calls: list[Tensor] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor)
        return all_reduce(tensor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", counted)
        optimizer.step()
    return len(calls)


def test_groups_share_one_all_reduce(two_ranks: Workers) -> None:
    assert two_ranks.run(all_reduces_of_a_step, [True, 0.5, 0.25]) == [1, 1]


def distances_after_centralize_gradients(mesh_name: str, strength: float) -> dict[str, float]:
    """Center sharded gradients; return the largest differences to whole ones on this rank."""
    mesh_shape, placements = MESHES[mesh_name]
    mesh, numbers = init_device_mesh("cpu", mesh_shape), torch.Generator().manual_seed(0)
    whole = {name: torch.randn(*LAYOUTS[name][0], generator=numbers, dtype=torch.float64) + 0.5 for name in NAMES}

    def placed(tensor: Tensor) -> Any:
        return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)

    params = nn.ParameterDict({name: nn.Parameter(placed(tensor)) for name, tensor in whole.items()})
    for name, gradient in whole.items():
        params[name].grad = placed(gradient)
    overrides: dict[Any, Any] = {name: vectors for name, (_, vectors) in LAYOUTS.items()}
    gradcentral.centralize_gradients(layout=weight_layout(params, overrides=overrides), strength=strength)
    found = {}
    for name, gradient in whole.items():
        got, wanted = params[name].grad.to_local(), placed(center(gradient, LAYOUTS[name][1], strength)).to_local()
        found[name] = float((got - wanted).abs().max()) if got.numel() else 0.0
    return found


@pytest.mark.parametrize("mesh", ON_TWO)
def test_centralize_gradients_of_shards_takes_a_strength(two_ranks: Workers, mesh: str) -> None:
    for distances in two_ranks.run(distances_after_centralize_gradients, mesh, 0.25):
        assert {name: distance for name, distance in distances.items() if not distance < 1e-12} == {}
