"""Modules that torch.jit and torch.export have converted keep the layouts of their classes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradcentral import WeightLayout, register_layout, weight_layout


class Kernel(nn.Linear):
    """A subclass that stores its weights as [in, out]; a converted copy may lack the sizes that reveal it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """A layer of torch.nn of each kind of decision, a raw parameter, and a subclass of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.project = nn.Parameter(torch.randn(4, 6))
        self.convolution = nn.Conv1d(6, 4, 1)
        self.kernel = Kernel(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x)) @ self.project
        head: Tensor = self.head(self.kernel(self.convolution(x.transpose(1, 2)).transpose(1, 2)))
        return head


EXAMPLE = torch.tensor([[1, 2, 3]])


def _scripted(model: nn.Module) -> nn.Module:
    scripted: nn.Module = torch.jit.script(model)
    return scripted


def _traced(model: nn.Module) -> nn.Module:
    traced: nn.Module = torch.jit.trace(model, EXAMPLE)
    return traced


def _reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(_scripted(model), file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)
    return loaded


def _exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (EXAMPLE,)).module()


def _unflattened(model: nn.Module) -> nn.Module:
    return torch.export.unflatten(torch.export.export(model, (EXAMPLE,)))


CONVERSIONS = [_scripted, _traced, _reloaded, _exported, _unflattened]
WITH_CLASS_OF_MODEL = [
    *CONVERSIONS[:-1],
    pytest.param(
        _unflattened,
        marks=pytest.mark.skipif(
            not hasattr(torch.export.UnflattenedModule, "type_name"),
            reason="torch 2.8 does not record the class of an unflattened model, only those of its layers",
        ),
    ),
]


def _converted(convert: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates torch.jit, but existing models use it
        return convert(model)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("inside", [False, True])
def test_converted_layers_keep_the_rules_of_their_classes(
    convert: Callable[[nn.Module], nn.Module], inside: bool
) -> None:
    model = _converted(convert, Net())
    layout = weight_layout(nn.ModuleDict({"inner": model}) if inside else model)
    found = {entry.name.removeprefix("inner."): entry for entry in layout.entries}
    assert {name: entry.vectors.pattern for name, entry in found.items() if entry.vectors} == {
        "convolution.weight": "o [i k]",
        "head.weight": "o [i]",
    }
    assert found["convolution.weight"].origin == "Conv1d.weight"
    assert "lookup" in found["embed.weight"].reason
    assert "normalization" in found["norm.weight"].reason
    assert [entry.name.removeprefix("inner.") for entry in layout.unknown] == ["project", "kernel.weight"]


@pytest.mark.parametrize("convert", WITH_CLASS_OF_MODEL)
@pytest.mark.parametrize("inside", [False, True])
def test_the_class_of_a_converted_model_is_reported(convert: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    model = _converted(convert, Net())
    layout = weight_layout(nn.ModuleDict({"inner": model}) if inside else model)
    assert layout.unknown[0].reason == "no rule for Net.project"


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_only_conv_applies_to_converted_layers(convert: Callable[[nn.Module], nn.Module]) -> None:
    layout = weight_layout(_converted(convert, Net()), only="conv")
    assert [layout.names[parameter] for parameter in layout] == ["convolution.weight"]


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_suggestions_for_converted_layers_name_no_class_of_torch(convert: Callable[[nn.Module], nn.Module]) -> None:
    model = _converted(convert, Net())
    lines = weight_layout(model).suggestions
    assert lines
    assert not any(name in line for line in lines for name in ("from torch", "Script", "Traced", "Interpreter"))


@pytest.mark.parametrize("convert", WITH_CLASS_OF_MODEL)
def test_rules_registered_for_a_class_apply_to_its_converted_instances(
    convert: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcentral.layout.rules._registered", {})
    register_layout(Net, "project", "[i] o")
    register_layout(Kernel, "weight", "[i] o")
    layout = weight_layout(_converted(convert, Net()))
    assert {name: layout[name].fan_in for name in ("project", "kernel.weight")} == {"project": 4, "kernel.weight": 4}
    assert not layout.unknown


def test_a_class_that_is_not_imported_is_named_and_its_parameters_are_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _converted(_reloaded, Net())
    monkeypatch.delitem(globals(), "Net")
    layout = weight_layout(model)
    assert layout.skipped["project"] == "no rule for Net.project"
    scope = {"gradcentral": __import__("gradcentral"), "model": model}
    for line in layout.suggestions:
        exec(line.replace('"project": None', '"project": "[i] o"'), scope)
    after = scope["layout"]
    assert isinstance(after, WeightLayout)
    assert after["project"].fan_in == 4


def test_a_traced_layer_without_the_sizes_of_a_split_axis_is_unknown() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, torch.zeros(1, 4, 5))
    (entry,) = weight_layout(traced).unknown
    assert "does not fit ConvTranspose1d" in entry.reason
    assert "the module lacks groups" in entry.reason
