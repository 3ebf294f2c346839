"""The remedy in every error message and warning works: the test extracts it from the message and executes it.

Remedies that need several ranks are in tests/distributed/test_remedies.py.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gradcentral
from gradcentral.attach import centering_of
from gradcentral.extras import MissingExtraError, optional
from gradcentral.kernels import planner
from gradcentral.projection import unit_means

PRELUDE = """
import copy
import gradcentral, torch
from gradcentral import WeightLayout, WeightVectors, center, center_weights_, centralize, weight_layout
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

ROWS = WeightVectors((1,))
model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
params = [*model.parameters()]
optimizer = torch.optim.SGD(params, lr=0.1)
batch = torch.randn(5, 4)

def backward():
    optimizer.zero_grad()
    model(batch).square().mean().backward()

def step():
    backward()
    optimizer.step()
"""

LAZY = "model = nn.Sequential(nn.LazyLinear(3))\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
LOOSE = (
    "params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6))]\n"
    "optimizer = torch.optim.SGD(params, lr=0.1)\nmodel = lambda x: nn.functional.linear(x, *params)\n"
)
NET = (
    "class Net(nn.Module):\n    weight_vectors = {{'w': 'o [i]'}}\n"
    "    def __init__(self):\n        super().__init__()\n        self.w = params[0]\n"
)
RAW = (
    "class Raw(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n        self.w = nn.Parameter(torch.randn(6, 4))\n"
    "    def forward(self, x):\n        return nn.functional.linear(x, self.w)\n"
    "Raw.__module__ = '<string>'\nmodel = Raw()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
)
SPARSE = (
    "model, batch = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)), torch.tensor([1, 2])\n"
    "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
)
TWO_MODELS = (
    "their_model = nn.Linear(4, 3)\nparams += their_model.parameters()\n"
    "backward = lambda: (model(batch).square().mean() + their_model(batch).square().mean()).backward()\n"
)


class Case(NamedTuple):
    """A mistake, the message that it causes, and code that follows the message."""

    before: str
    """Code that runs."""
    mistake: str
    """Code that raises or warns."""
    message: str
    """A pattern whose groups match what the message suggests."""
    remedy: str
    """Code that runs, with the groups at {0} and {1}. Afterwards the optimizer centers."""


CASES = {
    "unknown placement": Case(
        "",
        "centralize(optimizer, model, 'weights')",
        r"choose from (.+)$",
        "for placement in ({0}):\n"
        "    handle = centralize(optimizer, model, placement)\n    step()\n    handle.remove()\n"
        "centralize(optimizer, model, placement)",
    ),
    "parameters without a module": Case(
        LOOSE,
        "centralize(optimizer)",
        r"pass (model=), or (layout=WeightLayout.from_shapes\(params\))",
        NET + "centralize(optimizer, {0}Net()).remove()\ncentralize(optimizer, {1})",
    ),
    "no model for centralize_gradients": Case(
        "",
        "gradcentral.centralize_gradients()",
        r"pass (model=).* without a model, (layout=gradcentral.WeightLayout.from_parameters\(params\)) finds .*"
        r"(from_shapes\(params\))",
        "backward()\ngradcentral.centralize_gradients({0}model)\ngradcentral.centralize_gradients({1})\n"
        "gradcentral.centralize_gradients(layout=WeightLayout.{2})\ncentralize(optimizer, model)",
    ),
    "not a layout": Case(
        "",
        "centralize(optimizer, layout={})",
        r"must be a WeightLayout \((weight_layout\(model\))\)",
        "centralize(optimizer, layout={0})",
    ),
    "model and layout": Case(
        "",
        "centralize(optimizer, model, layout=weight_layout(model))",
        r"(layout=weight_layout\(model, \.\.\.\)) sets options",
        "centralize(optimizer, {0})",
    ),
    "model and layout of an optimizer": Case(
        "",
        "gradcentral.SGD(model, lr=0.1, layout=weight_layout(model))",
        r"(layout=weight_layout\(model, \.\.\.\)) sets options",
        "optimizer = gradcentral.SGD(params, lr=0.1, {0})",
    ),
    "two models of an optimizer": Case(
        "",
        "gradcentral.SGD(model, lr=0.1, model=copy.deepcopy(model))",
        r"as the first argument or as (model=)",
        "gradcentral.SGD(model, lr=0.1)\noptimizer = gradcentral.SGD(params, lr=0.1, {0}model)",
    ),
    "an optimizer of parameters without a module": Case(
        LOOSE,
        "gradcentral.SGD(params, lr=0.1)",
        r"pass (model=), or (layout=WeightLayout.from_shapes\(params\))",
        NET + "gradcentral.SGD(params, lr=0.1, {0}Net())\noptimizer = gradcentral.SGD(params, lr=0.1, {1})",
    ),
    "already attached": Case(
        "centralize(optimizer, model)",
        "centralize(optimizer, model, 'update')",
        r"remove that handle first: (.+)$",
        "{0}\ncentralize(optimizer, model, 'update')",
    ),
    "attached to an optimizer that centers": Case(
        "optimizer = gradcentral.SGD(model, lr=0.1)",
        "centralize(optimizer, model, 'update')",
        r"pass (placement=) when you create it",
        "optimizer = gradcentral.SGD(model, lr=0.1, {0}'update')",
    ),
    "a model of unknown layers": Case(
        RAW,
        "centralize(optimizer, model)",
        r"\n  (layout = gradcentral.weight_layout\(.*)# 6×4: None to skip it, (\"o \[i\]\")",
        "exec({0!r}.replace('None', {1!r}))\ncentralize(optimizer, layout=layout)",
    ),
    "a model of unknown layers for centralize_gradients": Case(
        RAW,
        "gradcentral.centralize_gradients(model)",
        r"\n  (layout = gradcentral.weight_layout\(.*)# 6×4: None to skip it, (\"o \[i\]\")",
        "exec({0!r}.replace('None', {1!r}))\nmodel(torch.randn(5, 4)).sum().backward()\n"
        "gradcentral.centralize_gradients(layout=layout)\ncentralize(optimizer, layout=layout)",
    ),
    "a model of unknown layers for center_weights_": Case(
        RAW,
        "center_weights_(model)",
        r"\n  (layout = gradcentral.weight_layout\(.*)# 6×4: None to skip it, (\"o \[i\]\")",
        "exec({0!r}.replace('None', {1!r}))\ncenter_weights_(model, layout)\ncentralize(optimizer, layout=layout)",
    ),
    "another model": Case(
        "other = copy.deepcopy(model)",
        "centralize(optimizer, other)",
        r"pass the model whose parameters it was created with",
        "centralize(optimizer, model)",
    ),
    "an optimizer older than its parameters": Case(
        "[weight_norm(layer) for layer in model]\nmodel[0].bias = model[1].bias = None\n",
        "centralize(torch.optim.SGD(params[:1], lr=0.1), model)",
        r"create the optimizer after moving, wrapping or sharding the model",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\ncentralize(optimizer, model)",
    ),
    "parameters of another model": Case(
        "centralize(optimizer, model)\nother = nn.Linear(4, 3)\n"
        "optimizer.add_param_group({'params': other.parameters()})\n"
        "backward = lambda: (model(batch).square().mean() + other(batch).square().mean()).backward()",
        "step()",
        r"call (gradcentral.centralize\(optimizer, their_model\)) for them",
        "their_model = other\n{0}",
    ),
    "parameters of another model in an own optimizer": Case(
        TWO_MODELS,
        "gradcentral.SGD(params, lr=0.1, model=model)",
        r"create it with all models, (model=.+?), or",
        "optimizer = gradcentral.SGD(params, lr=0.1, {0})",
    ),
    "parameters of another model added to an own optimizer": Case(
        TWO_MODELS + "optimizer = gradcentral.SGD(model, lr=0.1)\n"
        "optimizer.add_param_group({'params': their_model.parameters()})",
        "step()",
        r"create it with all models, (model=.+?), or",
        "optimizer = gradcentral.SGD(params, lr=0.1, {0})",
    ),
    "parameters of another model that are left out": Case(
        TWO_MODELS,
        "gradcentral.SGD(params, lr=0.1, model=model)",
        r'leave them out with ("centralize": False) in their group',
        "groups = [{{'params': model.parameters()}}, {{'params': their_model.parameters(), {0}}}]\n"
        "optimizer = gradcentral.SGD(groups, lr=0.1, model=model)",
    ),
    "a list of models": Case(
        TWO_MODELS + "models = [model, their_model]\noptimizer = torch.optim.SGD(params, lr=0.1)",
        "centralize(optimizer, models)",
        r"pass several models as (.+)$",
        "centralize(optimizer, {0})",
    ),
    "lazy parameters": Case(
        LAZY + "centralize(optimizer, model, 'update')",
        "optimizer.step(backward)",
        r"run one forward pass of the model before the first step",
        "model(batch)\noptimizer.step(backward)",
    ),
    "a copy with lazy parameters": Case(
        LAZY + "model, optimizer = copy.deepcopy((model, gradcentral.SGD(model, lr=0.1)))",
        "step()",
        r"create the layout and the optimizer again",
        "optimizer = gradcentral.SGD(model, lr=0.1)",
    ),
    "reshaped parameters": Case(
        "centralize(optimizer, model)\nmodel[1].weight.data = torch.randn(5, 6)\nmodel[1].bias.data = torch.randn(5)",
        "step()",
        r"attach after everything that reshapes parameters",
        "gradcentral.attached(optimizer)[0].remove()\ncentralize(optimizer, model)",
    ),
    "replaced parameters": Case(
        "centralize(optimizer, model)\nmodel[1] = nn.Linear(6, 5)",
        "step()",
        r"create the optimizer, and attach Gradient Centralization, after .* anything else that replaces parameters",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\ncentralize(optimizer, model)",
    ),
    "a layer replaced later": Case(
        "centralize(optimizer, model)\nstep()\nmodel[1] = nn.Linear(6, 5)",
        "step()",
        r"add them with (optimizer.add_param_group\(.*\)), or",
        "new_parameters = [*model[1].parameters()]\n{0}\n",
    ),
    "a parametrization after the optimizer": Case(
        "centralize(optimizer, model)\nweight_norm(model[1])",
        "step()",
        r"create the optimizer, and attach Gradient Centralization, after .*weight_norm",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "centralize(optimizer, layout=weight_layout(model, exclude=['1.*']))",
    ),
    "adapters after the optimizer": Case(
        "centralize(optimizer, model)\nmodel.requires_grad_(False)\nmodel.append(nn.Linear(3, 2))",
        "step()",
        r"create the optimizer, and attach Gradient Centralization, after get_peft_model",
        "optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)\n"
        "centralize(optimizer, layout=weight_layout(model, exclude=['0.*', '1.*']))",
    ),
    "a sparse gradient, skipped": Case(
        SPARSE + "centralize(optimizer, layout=weight_layout(model, overrides={'0.weight': ROWS}))",
        "step()",
        r"skip it with (layout=weight_layout\(model, exclude=\[.+?\]\))",
        "gradcentral.attached(optimizer)[0].remove()\ncentralize(optimizer, {0})",
    ),
    "a sparse gradient, made dense": Case(
        SPARSE + "centralize(optimizer, layout=weight_layout(model, overrides={'0.weight': ROWS}))",
        "step()",
        r"make the gradient dense \((sparse=False)\)",
        "model[0] = nn.Embedding(9, 4, {0})\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "centralize(optimizer, layout=weight_layout(model, overrides={{'0.weight': ROWS}}))",
    ),
    "a sparse gradient of a parameter with brackets in its name": Case(
        "model = nn.ModuleDict({'[user]*': nn.Linear(4, 3), 'item': nn.Linear(3, 2)})\n"
        "model.forward = lambda x: model['item'](model['[user]*'](x))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\ncentralize(optimizer, model)\nbackward()\n"
        "weight = model['[user]*'].weight\nweight.grad = weight.grad.to_sparse()",
        "optimizer.step()",
        r"skip it with (layout=weight_layout\(model, exclude=\[.+?\]\))",
        "gradcentral.attached(optimizer)[0].remove()\ncentralize(optimizer, {0})",
    ),
    "a sparse gradient under the shape rule": Case(
        SPARSE + "params = [*model.parameters()]\n"
        "optimizer = gradcentral.SGD(params, lr=0.1, layout=WeightLayout.from_shapes(params))",
        "step()",
        r"pass (model=), so that embeddings are recognized",
        "optimizer = gradcentral.SGD(params, lr=0.1, {0}model)",
    ),
    "center: a sparse tensor": Case(
        "tensor = torch.eye(3).to_sparse()",
        "center(tensor, ROWS)",
        r"pass (tensor\.to_dense\(\))",
        "center({0}, ROWS)\ncentralize(optimizer, model)",
    ),
    "center: integers": Case(
        "tensor = torch.ones(3, 3, dtype=torch.int64)",
        "center(tensor, ROWS)",
        r"needs a (float)ing-point or complex type",
        "center(tensor.{0}(), ROWS)\ncentralize(optimizer, model)",
    ),
    "center_weights_: lazy parameters": Case(
        LAZY,
        "center_weights_(model)",
        r"run one forward pass of the model first",
        "model(batch)\ncenter_weights_(model)\ncentralize(optimizer, model)",
    ),
    "center_weights_: the layout of another model": Case(
        "other = copy.deepcopy(model)",
        "center_weights_(model, weight_layout(other))",
        r"pass (weight_layout\(model\))$",
        "center_weights_(model, {0})\ncentralize(optimizer, model)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_suggestion_of_a_message_works(name: str) -> None:
    case = CASES[name]
    scope: dict[str, Any] = {}
    exec(PRELUDE + case.before, scope)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # also where pytest is told not to turn warnings into errors
        with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning)) as raised:
            exec(case.mistake, scope)
    found = re.search(case.message, str(raised.value))
    assert found, str(raised.value)
    suggested = [group.replace("...", "only='all'") for group in found.groups()]
    exec(case.remedy.format(*suggested), scope)
    _assert_step_centers(scope)


def _assert_step_centers(scope: dict[str, Any]) -> None:
    """Under SGD without momentum and weight decay, either placement keeps the mean of every weight vector."""
    layouts = [targets.layout for targets in centering_of(scope["optimizer"])]
    pairs = [(p, vectors) for layout in layouts for p, vectors in layout.items()]
    assert pairs
    scope["step"]()
    weights = [(p, vectors, p.detach().clone()) for p, vectors in pairs]
    scope["step"]()
    for p, vectors, before in weights:
        assert not torch.equal(p, before)
        torch.testing.assert_close(unit_means(p.detach(), vectors), unit_means(before, vectors), rtol=0, atol=1e-6)


def test_the_choices_for_the_kernels_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCENTRAL_KERNELS", "cuda")
    with pytest.raises(
        ImportError, match=r"unknown GRADCENTRAL_KERNELS='cuda'; choose from (.+), or unset it"
    ) as raised:
        planner._check_choice()
    found = re.search("choose from (.+), or unset it", str(raised.value))
    assert found
    for choice in found[1].split(", "):
        monkeypatch.setenv("GRADCENTRAL_KERNELS", choice)
        if reason := planner.unavailable_reasons()[choice]:
            with pytest.raises(ImportError, match=re.escape(reason)):
                planner._check_choice()
        else:
            planner._check_choice()
    monkeypatch.delenv("GRADCENTRAL_KERNELS")
    planner._check_choice()


def test_every_extra_that_a_message_suggests_exists() -> None:
    """The installation itself is not executed."""
    root = Path(__file__).parents[1]
    declared = re.search(r"\[project.optional-dependencies\](.+?)\n\[", (root / "pyproject.toml").read_text(), re.S)
    assert declared
    extras = set(re.findall(r"^(\w+) = \[", declared[1], re.M))
    with pytest.raises(MissingExtraError, match="pip install") as raised:
        optional("no_such_library")
    suggested = {*re.findall(r"gradcentral\[(\w+)\]", str(raised.value))}
    assert suggested
    for path in Path(gradcentral.__file__).parent.rglob("*.py"):
        calls = re.findall(r"\boptional\(\"[\w.]+\", (?:extra=)?\"(\w+)\"\)", path.read_text())
        suggested.update(calls, re.findall(r"gradcentral\[(\w+)\]", path.read_text()))
    assert suggested <= extras
