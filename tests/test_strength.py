"""The strength s of P_s = I − s·eeᵀ: every route subtracts s times the mean, and s may change while training."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import gradcentral
from gradcentral import (
    WeightVectors,
    center,
    center_update_,
    centered_update,
    centralize,
    centralize_gradients,
    centralize_in_backward,
    weight_layout,
)
from gradcentral.kernels import triton
from gradcentral.optim.reference import AdamState, adam_step, sgd_step
from gradcentral.projection import projection_matrix, restore_means_, unit_means
from gradcentral.targets import PLACEMENTS
from tests.strategies import Case, cases, shapes_and_vectors

DTYPES = (torch.float32, torch.bfloat16) if triton.serves_cpu else (torch.float64, torch.float32, torch.bfloat16)
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
ADAM: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05, "eps": 1e-3}
ROUTES = ("fused", "torch's step", "attached")


def _make(route: str, kind: str, params: list[Any], layout: Any, placement: str, strength: Any) -> Optimizer:
    options = SGD if kind == "SGD" else ADAM
    gc: dict[str, Any] = {"layout": layout, "placement": placement, "strength": strength}
    if "attached" in route:
        optimizer: Optimizer = getattr(torch.optim, kind)(params, **options)
        centralize(optimizer, **gc)
        return optimizer
    fused = False if route == "torch's step" else None
    own: Optimizer = getattr(gradcentral, kind)(params, **options, **gc, fused=fused)
    return own


def _reference(kind: str, w: Tensor, g: Tensor, state: Any, vectors: Any, placement: str, s: float) -> Any:
    if kind == "SGD":
        return sgd_step(w, g, state, vectors, placement, strength=s, **SGD)
    state = AdamState.zero(w) if state is None else state
    return adam_step(w, g, state, vectors, placement, strength=s, **ADAM, decoupled=kind == "AdamW")


PARTS = st.floats(0, 1) | st.sampled_from([0.0, 1.0])


class Drawn(NamedTuple):
    """What one property test draws."""

    shapes: list[tuple[tuple[int, ...], WeightVectors]]
    orders: list[list[int]]
    """The order of the axes in memory."""
    dtype: torch.dtype
    placement: str
    kind: str
    strengths: list[float]
    """Of the optimizer or handle, in each step."""
    settings: list[list[Any]]
    """The option "centralize" of each parameter's group in each step; None leaves it as it is."""
    as_tensors: bool
    seed: int


@st.composite
def draws(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Drawn:
    """Draw a problem of one or two parameters of any layout, and one more that is always centered, for two steps."""
    shapes = [*draw(st.lists(shapes_and_vectors(), min_size=1, max_size=2)), ((2, 3), WeightVectors((1,)))]
    options = st.sampled_from([None, True, False]) | PARTS
    return Drawn(
        shapes=shapes,
        orders=[draw(st.permutations(range(len(shape)))) for shape, _ in shapes],
        dtype=draw(st.sampled_from(dtypes)),
        placement=draw(st.sampled_from(PLACEMENTS)),
        kind=draw(st.sampled_from(["SGD", "Adam", "AdamW"])),
        strengths=[draw(PARTS), draw(PARTS)],
        settings=[[*(draw(options) for _ in shapes[1:]), draw(st.none() | PARTS)] for _ in range(2)],
        as_tensors=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def _check_against_the_reference(drawn: Drawn, route: str) -> None:
    """Take two steps; compare the weights with those of the reference in float64."""
    numbers = torch.Generator().manual_seed(drawn.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64).to(drawn.dtype)

    params = []
    for (shape, _), order in zip(drawn.shapes, drawn.orders, strict=True):
        w = randn(*(shape[axis] for axis in order))
        params.append(nn.Parameter(w.permute(*(order.index(axis) for axis in range(len(shape))))))
    vectors = [v for _, v in drawn.shapes]
    rules: dict[Any, Any] = {str(i): v for i, v in enumerate(vectors) if v.for_shape(params[i].shape).fan_in > 1}
    layout = weight_layout(nn.ParameterList(params), overrides=rules)
    scalars = {value: torch.tensor(value, dtype=torch.float64) for value in _numbers_of(drawn)}

    def given(value: Any) -> Any:
        return scalars[value] if drawn.as_tensors and type(value) is float else value

    groups: list[dict[str, Any]] = [{"params": [p]} for p in params]
    for group, setting in zip(groups, drawn.settings[0], strict=True):
        group |= {} if setting is None else {"centralize": given(setting)}
    optimizer = _make(route, drawn.kind, groups, layout, drawn.placement, given(drawn.strengths[0]))
    holder: Any = gradcentral.attached(optimizer)[0] if "attached" in route else optimizer
    step = torch.compile(optimizer.step, backend="eager") if "compiled" in route else optimizer.step
    expected: list[Tensor] = [p.detach().double() for p in params]
    states: list[Any] = [None] * len(params)
    now: list[Any] = [None] * len(params)
    for strength, settings_of_groups in zip(drawn.strengths, drawn.settings, strict=True):
        holder.strength = given(strength)
        for i, (p, setting) in enumerate(zip(params, settings_of_groups, strict=True)):
            if setting is not None:
                optimizer.param_groups[i]["centralize"] = given(setting)
                now[i] = setting
            s = strength if now[i] is None else strength * now[i] if isinstance(now[i], bool) else now[i]
            p.grad = torch.empty_like(p).copy_(randn(*p.shape) + 0.5)
            chosen = vectors[i] if str(i) in rules else None
            expected[i], states[i] = _reference(
                drawn.kind, expected[i], p.grad.double(), states[i], chosen, drawn.placement, s
            )
        step()
    for p, wanted in zip(params, expected, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[drawn.dtype]
        if "compiled" in route and drawn.kind != "SGD":  # torch traces the bias corrections of Adam in float32
            tolerance = max(tolerance, 1e-5)
        torch.testing.assert_close(p.detach().double(), wanted, rtol=tolerance, atol=tolerance)


def _numbers_of(drawn: Drawn) -> set[float]:
    every = [*drawn.strengths, *(setting for step in drawn.settings for setting in step)]
    return {value for value in every if type(value) is float}


@settings(max_examples=10 if triton.serves_cpu else 60)
@given(drawn=draws(), route=st.sampled_from(ROUTES))
def test_steps_of_any_strengths_equal_the_reference_in_float64(drawn: Drawn, route: str) -> None:
    """Optimizer and groups have their own strengths, which change between the steps, in any memory format."""
    _check_against_the_reference(drawn, route)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("route", ["compiled", "compiled and attached"])
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(drawn=draws())
def test_compiled_steps_of_any_strengths_equal_the_reference(route: str, drawn: Drawn) -> None:
    torch._dynamo.reset()
    _check_against_the_reference(drawn, route)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("attach", [False, True])
def test_compiled_groups_may_share_a_strength_and_part(attach: bool) -> None:
    """Dynamo takes a tensor that two groups share for one input of the graph, and does not notice when they differ."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    shared = torch.tensor(1.0, dtype=torch.float64)
    groups: list[dict[str, Any]] = [{"params": layer.parameters(), "centralize": shared} for layer in model]
    optimizer = torch.optim.SGD(groups, lr=0.1) if attach else gradcentral.SGD(groups, lr=0.1, model=model)
    if attach:
        centralize(optimizer, model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for strengths in ([shared, shared], [shared.new_tensor(0.5), shared.new_tensor(0.25)]):
        expected = []
        for group, strength in zip(optimizer.param_groups, strengths, strict=True):
            group["centralize"] = strength
            weight, bias = group["params"]
            weight.grad, bias.grad = torch.randn_like(weight), torch.zeros_like(bias)
            expected.append(weight.detach() - 0.1 * center(weight.grad, "o [i]", float(strength)))
        step()
        for group, weight in zip(optimizer.param_groups, expected, strict=True):
            torch.testing.assert_close(group["params"][0].detach(), weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("attach", [False, True])
def test_a_compiled_step_checks_the_value_of_a_tensor(attach: bool) -> None:
    torch._dynamo.reset()
    model, strength = nn.Linear(4, 3), torch.tensor(0.5)
    optimizer: Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1) if attach else gradcentral.SGD(model, lr=0.1, strength=strength)
    )
    if attach:
        centralize(optimizer, model, strength=strength)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    model.weight.grad, model.bias.grad = torch.randn(3, 4), torch.randn(3)
    step()
    before = model.weight.detach().clone()
    strength.fill_(3.0)
    with pytest.raises(ValueError, match=r"strength must be between 0 and 1, not 3\.0"):
        step()
    assert torch.equal(model.weight, before)


@given(case=cases((torch.float64, torch.complex128), expanded=False), s=st.floats(0, 1))
def test_center_subtracts_a_part_of_the_mean(case: Case, s: float) -> None:
    found = center(case.tensor, case.vectors, s)
    torch.testing.assert_close(found, case.tensor - s * (case.tensor - center(case.tensor, case.vectors)))
    assert torch.equal(center(case.tensor, case.vectors, 1.0), center(case.tensor, case.vectors))


def test_it_is_the_matrix_of_the_definition() -> None:
    g = torch.randn(5, dtype=torch.float64)
    removed = torch.eye(5, dtype=torch.float64) - projection_matrix(5, dtype=torch.float64)
    torch.testing.assert_close(center(g[None], "o [i]", 0.3)[0], g - 0.3 * removed @ g)


@given(case=cases((torch.float64,), expanded=False), s=st.floats(0, 1))
def test_under_update_the_mean_moves_by_the_rest(case: Case, s: float) -> None:
    old, new = torch.randn_like(case.tensor), case.tensor.clone()
    before, plain = unit_means(old, case.vectors), unit_means(new, case.vectors)
    after = unit_means(restore_means_(new, before, case.vectors, s), case.vectors)
    torch.testing.assert_close(after - before, (1 - s) * (plain - before), rtol=0, atol=1e-12)


def test_centralize_gradients_takes_a_strength() -> None:
    model = nn.Linear(4, 3)
    for s in (0.25, torch.tensor(0.25)):
        model.weight.grad = torch.randn(3, 4)
        expected = center(model.weight.grad, "o [i]", 0.25)
        centralize_gradients(model, strength=s)
        torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_centralize_gradients_takes_a_strength() -> None:
    model = nn.Linear(4, 3)
    layout = weight_layout(model)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def center_all(strength: Any) -> None:
        centralize_gradients(layout=layout, strength=strength)

    for s in (0.25, 0.5, torch.tensor(0.75), 0.0, 1.0):
        gradient = torch.randn(3, 4)
        model.weight.grad = gradient.clone()
        center_all(s)
        torch.testing.assert_close(model.weight.grad, center(gradient, "o [i]", float(s)))


WITHOUT_GROUPS = ["centralize_in_backward", "centralize_gradients", "centered_update", "center_update_"]


@pytest.mark.parametrize("route", WITHOUT_GROUPS)
def test_parts_of_a_model_have_strengths_of_their_own_without_groups(route: str) -> None:
    """One call per part, each with the layout of the part."""
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    parts = [weight_layout(model, exclude=[name]) for name in ("1.weight", "0.weight")]
    data = torch.randn(8, 4, dtype=torch.float64)
    gradients = torch.autograd.grad(model(data).square().sum(), [layer.weight for layer in model])
    if route == "centralize_in_backward":
        for layout, s in zip(parts, (1.0, 0.5), strict=True):
            gradcentral.centralize_in_backward(layout=layout, strength=s)
    old = [layer.weight.detach().clone() for layer in model]
    model(data).square().sum().backward()
    if route == "centralize_gradients":
        for layout, s in zip(parts, (1.0, 0.5), strict=True):
            centralize_gradients(layout=layout, strength=s)
    if route == "centered_update":
        with centered_update(model, parts[0], 1.0), centered_update(model, parts[1], 0.5), torch.no_grad():
            for layer in model:
                layer.weight -= layer.weight.grad
        found = [w - layer.weight for w, layer in zip(old, model, strict=True)]
    elif route == "center_update_":
        before = {f"{i}.weight": w for i, w in enumerate(old)}
        after = {name: w - g for (name, w), g in zip(before.items(), gradients, strict=True)}
        for layout, s in zip(parts, (1.0, 0.5), strict=True):
            center_update_(after, before, layout, strength=s)
        found = [before[name] - after[name] for name in before]
    else:
        found = [layer.weight.grad for layer in model]
    for change, gradient, s in zip(found, gradients, (1.0, 0.5), strict=True):
        torch.testing.assert_close(change, center(gradient, "o [i]", s))


# Settings.

BAD: tuple[Any, ...] = (-0.1, 1.1, math.nan, math.inf, torch.tensor(2.0), torch.tensor(math.nan), torch.ones(2))
BAD = (*BAD, torch.tensor(True), "0.5", None, 1j, [0.5], np.array([0.5]), Decimal("0.5"))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_strength_outside_0_to_1_raises(bad: Any) -> None:
    model = nn.Linear(4, 3)
    model.weight.grad = torch.ones(3, 4)
    optimizer, own = torch.optim.SGD(model.parameters(), lr=0.1), gradcentral.SGD(model, lr=0.1)
    handle = centralize(optimizer, model, strength=0.5)
    calls: list[Callable[[], Any]] = [
        lambda: centralize(torch.optim.SGD(model.parameters(), lr=0.1), model, strength=bad),
        lambda: gradcentral.AdamW(model, strength=bad),
        lambda: setattr(handle, "strength", bad),
        lambda: setattr(own, "strength", bad),
        lambda: centralize_gradients(model, strength=bad),
        lambda: center(torch.ones(2, 2), "o [i]", bad),
        lambda: centralize_in_backward(model, strength=bad),
        lambda: center_update_(torch.ones(2, 2), torch.ones(2, 2), "o [i]", strength=bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="strength must be "):
            call()
    assert handle.strength == 0.5
    assert own.strength == 1


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), Fraction(1, 4), np.int64(1), True])
def test_a_strength_may_be_any_real_number(value: Any) -> None:
    g = torch.arange(12.0).view(3, 4)
    expected = center(g, "o [i]", float(value))
    torch.testing.assert_close(center(g, "o [i]", value), expected)
    for own in (True, False):
        model = nn.Linear(4, 3, bias=False)
        w = model.weight.detach().clone()
        if own:
            optimizer: Optimizer = gradcentral.SGD(model, lr=1.0, strength=value)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            centralize(optimizer, model, strength=value)
        model.weight.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(w - model.weight.detach(), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_strength_0_is_torchs_step_even_where_a_mean_does_not_exist(route: str, placement: str) -> None:
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer = _make(route, "SGD", [*model.parameters()], weight_layout(model), placement, 0.0)
    plain = torch.optim.SGD(twin.parameters(), **SGD)
    for net, opt in ((model, optimizer), (twin, plain)):
        for p in net.parameters():
            p.grad = torch.arange(float(p.numel())).view(p.shape)
        net.weight.grad[1, 2] = math.inf  # type: ignore[index]
        opt.step()
    torch.testing.assert_close(model.weight, twin.weight)
    assert model.weight.isfinite().sum() == 11


@pytest.mark.parametrize("route", ["fused", "attached"])
def test_a_closure_sees_the_strength_once(route: str) -> None:
    """Gradients that exist before the step are not centered twice, although P_s of P_s is not P_s."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    w, g = model.weight.detach().clone(), torch.randn(3, 4, dtype=torch.float64) + 0.5
    if route == "fused":
        optimizer: Optimizer = gradcentral.SGD(model, lr=1.0, strength=0.5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        centralize(optimizer, model, strength=0.5)
    model.weight.grad = g.clone()

    def closure() -> float:
        assert model.weight.grad is not None
        model.weight.grad += g
        return 0.0

    optimizer.step(closure)
    torch.testing.assert_close(model.weight.detach(), w - center(2 * g, "o [i]", 0.5))


def test_state_dicts_do_not_contain_it_and_copies_keep_it() -> None:
    model = nn.Linear(4, 3)
    optimizer = gradcentral.AdamW(model, strength=0.25)
    plain = torch.optim.AdamW(model.parameters())
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.state_dict()["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.strength == 0.25
    assert copy.deepcopy(optimizer).strength == pickle.loads(pickle.dumps(optimizer)).strength == 0.25


def test_attaching_again_with_another_strength_raises() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = centralize(optimizer, model, strength=0.5)
    assert centralize(optimizer, model, strength=0.5) is handle
    with pytest.raises(ValueError, match=r"strength 0\.5; requested: 'gradient', 1, 1\.0\)"):
        centralize(optimizer, model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("route", ["fused", "attached"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_compiled_step_follows_the_strength(route: str, placement: str, as_tensor: bool) -> None:
    results = []
    start = nn.Linear(4, 3)
    for compiled in (False, True):
        model = copy.deepcopy(start)
        scalar = torch.tensor(0.5)
        first = scalar if as_tensor else 0.5
        optimizer = _make(route, "SGD", [*model.parameters()], weight_layout(model), placement, first)
        holder: Any = gradcentral.attached(optimizer)[0] if route == "attached" else optimizer
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        numbers = torch.Generator().manual_seed(0)
        for s in (0.5, 0.25, 0.75):
            if as_tensor:
                scalar.fill_(s)
            else:
                holder.strength = s
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=numbers) + 0.5
            step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_the_loop_in_the_docs_warms_gc_in_and_switches_it_off() -> None:
    page = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text()
    (loop,) = re.findall(r"```python\n(handle = [^`]*?for epoch in range\(100\)[^`]*)```", page)
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rest: list[float] = []
    seen: dict[str, Tensor] = {}

    def keep_gradient(*_: object) -> None:
        assert model.weight.grad is not None
        seen.update(gradient=model.weight.grad.clone(), weights=model.weight.detach().clone())

    def measure(*_: object) -> None:
        """Record the part of the mean that remains in the change of the weights."""
        plain, moved = -1e-3 * seen["gradient"].mean(1), (model.weight.detach() - seen["weights"]).mean(1)
        rest.append(float((moved @ plain) / (plain @ plain)))

    optimizer.register_step_pre_hook(keep_gradient)  # before the hook of `centralize`
    optimizer.register_step_post_hook(measure)
    in_float64 = loop.replace("torch.randn(8, 4)", "torch.randn(8, 4, dtype=torch.float64)")
    exec(in_float64, {"torch": torch, "gradcentral": gradcentral, "model": model, "optimizer": optimizer})
    expected = [1.0, 0.8, 0.6, 0.4, 0.2, *[0.0] * 45, *[1.0] * 50]
    assert rest == pytest.approx(expected, abs=1e-6)
