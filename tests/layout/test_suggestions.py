"""The suggested code for parameters without a rule: it runs, and each line decides one kind of parameter."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gradcentral
from gradcentral import WeightLayout, weight_layout
from gradcentral.layout.report import as_json


class Plain(nn.Module):
    """A layer that declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(4, 3))
        self.parts = nn.ParameterList([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)])


class Parametrized(nn.Module):
    """A layer whose rule does not apply to the parameter behind a custom parametrization."""

    weight_vectors: ClassVar = {"weight": "o [i]"}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        parametrize.register_parametrization(self, "weight", nn.Softplus())


class Variables(nn.Module):
    """A layer whose weights, of any shapes, are in a container, as in the models of Keras."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.variables = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})


class Items(nn.Module):
    """The same in a list."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.items = nn.ParameterList([torch.zeros(shape) for shape in shapes])


class Nested(nn.Module):
    """A list of lists."""

    def __init__(self, *items: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.items = nn.ParameterList([nn.ParameterList([torch.zeros(shape) for shape in shapes]) for shapes in items])


class OfAnyShape(nn.Module):
    """A layer with a parameter of any shape."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class InMain(Plain):
    """A class of a script."""


def _local_class() -> nn.Module:
    class Local(Plain):
        pass

    return Local()


def _changed_shape(layer: nn.Module, *shape: int) -> nn.Module:
    layer.register_parameter("weight", nn.Parameter(torch.zeros(shape)))
    return layer


ODD = ['"', "'", "\\", "w[0]", "*", "ü😀", "\n"]
"""Names of parameters that must be quoted with care."""

MODELS: list[tuple[str, Callable[[], nn.Module], list[str]]] = [
    ("a class", lambda: Plain(), ['register_layout(Plain, "mix"', 'register_layout(Plain, "parts.*"']),
    ("a local class", _local_class, ['"0.mix": None', '"0.parts.0": None', '"0.parts.1": None']),
    ("a layer of torch.nn", lambda: _changed_shape(nn.Linear(4, 3), 3, 2, 2), ['overrides={"0.weight": None}']),
    ("a parametrization", lambda: Parametrized(), ['overrides={"0.parametrizations.weight.original": None}']),
    ("a container", lambda: nn.ParameterDict({"w[0]": torch.zeros(3, 4)}), ['overrides={"0.w[0]": None}']),
    ("flat weights", lambda: OfAnyShape(48), ["register_layout(OfAnyShape, "]),
    ("flat weights of prime size", lambda: OfAnyShape(47), ["register_layout(OfAnyShape, "]),
    *((f"name {odd!r}", lambda odd=odd: OfAnyShape(3, 4, name=odd), ["register_layout(OfAnyShape, "]) for odd in ODD),
    ("odd names", lambda: nn.ParameterDict({odd: torch.zeros(3, 4) for odd in ODD}), ["overrides={\n"]),
    (
        "a dictionary of different shapes",
        lambda: Variables(kernel=(3, 3, 2, 6), dense=(18, 4)),
        ['register_layout(Variables, "variables.kernel"', 'register_layout(Variables, "variables.dense"'],
    ),
    (
        "a list of different shapes",
        lambda: Items((3, 4), (3, 4), (5, 4)),
        [f'register_layout(Items, "items.{item}", None)' for item in range(3)],
    ),
    (
        "lists in a dictionary",
        lambda: Nested([(3, 4), (3, 4)], [(5, 4), (5, 4)]),
        [f'register_layout(Nested, "items.{item}", None)' for item in ("0.0", "0.1", "1.0", "1.1")],
    ),
    ("alike lists in a dictionary", lambda: Nested([(3, 4)], [(3, 4)]), ['register_layout(Nested, "items.*.*", None)']),
    (
        "a dictionary with a bias",
        lambda: Variables(kernel=(18, 4), bias=(4,)),
        ['register_layout(Variables, "variables.kernel", None)'],
    ),
    (
        "a class of different numbers of axes",
        lambda: nn.Sequential(OfAnyShape(4, 3), OfAnyShape(2, 4, 3)),
        ['"0.0.weight": None,  # 4×3:', '"0.1.weight": None,  # 2×4×3:'],
    ),
    (
        "a class of different sizes",
        lambda: nn.Sequential(OfAnyShape(4, 3), OfAnyShape(5, 7)),
        ['register_layout(OfAnyShape, "weight", None)  # 4×3, 5×7: '],
    ),
]


def _edited(code: str) -> Iterator[tuple[str, bool]]:
    """Yield the code, and the code with every None replaced by one of the rules that its comment suggests."""
    yield code, False
    comments = [re.findall(r'"[^"]*\[[^"]*"', line.partition("  # ")[2]) for line in code.splitlines()]
    for choice in range(min((len(rules) for rules in comments if rules), default=0)):
        lines = [
            re.sub(r"None(?=[,)}])", rules[min(choice, len(rules) - 1)], line.partition("  # ")[0]) if rules else line
            for line, rules in zip(code.splitlines(), comments, strict=True)
        ]
        yield "\n".join(lines), True


def _after(code: str, model: nn.Module) -> WeightLayout:
    scope: dict[str, Any] = {"gradcentral": gradcentral, "model": model, "InMain": InMain}
    exec(code, scope)
    layout: WeightLayout = scope["layout"] if "layout" in scope else weight_layout(model)
    return layout


@pytest.mark.parametrize(("make", "expected"), [c[1:] for c in MODELS], ids=[c[0] for c in MODELS])
def test_suggestions_run_unchanged_and_with_each_suggested_edit(
    make: Callable[[], nn.Module], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(make())
    _check(model, expected, monkeypatch)


@pytest.mark.parametrize("name", ["__main__", "task_file"])
def test_suggestions_for_a_class_of_a_script_need_no_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType(name)  # executed, so that it cannot be imported
    monkeypatch.setitem(sys.modules, name, script)
    monkeypatch.setattr(script, "InMain", InMain, raising=False)
    monkeypatch.setattr(InMain, "__module__", name)
    model = nn.Sequential(InMain())
    _check(model, ["gradcentral.register_layout(InMain"], monkeypatch)
    assert not any("import" in code for code in weight_layout(model).suggestions)


def _check(model: nn.Module, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = weight_layout(model)
    code = "\n".join(before.suggestions)
    assert [line for line in expected if line not in code] == []
    assert {entry.suggestion for entry in before.unknown} == {*before.suggestions}
    for suggested in before.suggestions:
        for edited, is_centered in _edited(suggested):
            monkeypatch.setattr("gradcentral.layout.rules._registered", {})
            after = _after(edited, model)
            for entry in before.unknown:
                if entry.suggestion == suggested:
                    assert (entry.parameter in after) is is_centered
                    assert entry.name not in [unknown.name for unknown in after.unknown]


def test_all_suggestions_pasted_together_decide_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line keeps its effect, whatever is pasted after it."""
    model = nn.ModuleDict(
        {"one": _local_class(), "two": Variables(kernel=(3, 3, 2, 6), dense=(18, 4)), "three": Plain()}
    )
    monkeypatch.setattr("gradcentral.layout.rules._registered", {})
    code = "\n".join(weight_layout(model).suggestions)
    patterns = {"3×3×2×6": "[k k i] o", "18×4": "[i] o", "4×3": "[i] o", "2×3×4": "e o [i]"}
    lines = []
    for line in code.splitlines():
        shape = re.search(r"  # (\S+?):", line)
        lines.append(line.replace("None", f'"{patterns[shape[1]]}"', 1) if shape else line)
    layout = _after("\n".join(lines), model)
    assert not layout.unknown
    for entry in layout.entries:
        assert entry.vectors
        assert entry.vectors.pattern == patterns["×".join(map(str, entry.parameter.shape))]


def test_one_line_is_suggested_for_repeated_layers() -> None:
    layout = weight_layout(nn.Sequential(Plain(), Plain()))
    mix, parts = layout.suggestions
    register = f"from {Plain.__module__} import Plain; gradcentral.register_layout(Plain, "
    assert mix.startswith(f'{register}"mix", None)  # 4×3: ')
    assert parts.startswith(f'{register}"parts.*", None)  # 2×3×4: ')
    assert mix in str(layout)


def test_a_rule_is_not_suggested_for_a_class_whose_other_layers_have_one() -> None:
    class_ = OfAnyShape
    model = nn.Sequential(class_(4, 3), class_(4, 3))
    layout = weight_layout(model, overrides={"0.weight": "o [i]"})
    assert layout.suggestions[0].startswith('layout = gradcentral.weight_layout(model, overrides={"1.weight": None})')


def test_frozen_parameters_are_not_unknown() -> None:
    model = nn.Sequential(Plain(), OfAnyShape(4, 3))
    model[1].requires_grad_(False)
    layout = weight_layout(model)
    assert [entry.name for entry in layout.unknown] == ["0.mix", "0.parts.0", "0.parts.1"]
    assert "3 skipped as unknown" in layout.summary()
    assert not any("OfAnyShape" in code for code in layout.suggestions)
    assert "no rule for OfAnyShape.weight; not trained" in str(layout)
    model.requires_grad_(True)
    assert "4 skipped as unknown" in layout.summary()


# Layers that many projects copy, written as in the originals: the parameters and the computation.


class KANLinear(nn.Module):
    def __init__(self, in_features: int = 5, out_features: int = 3) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, 8))
        self.spline_scaler = nn.Parameter(torch.ones(out_features, in_features))


class EqualLinear(nn.Module):
    def __init__(self, in_dim: int = 5, out_dim: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))


class EqualConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))


class ModulatedConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_channel, self.out_channel, self.kernel_size = 3, 4, 3
        self.weight = nn.Parameter(torch.randn(1, 4, 3, 3, 3))


class SpectralConv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 3, 4
        self.weights1 = nn.Parameter(torch.randn(3, 4, 6, dtype=torch.cfloat))


class SpectralConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 3, 4
        self.weights1 = nn.Parameter(torch.randn(3, 4, 6, 5, dtype=torch.cfloat))
        self.weights2 = nn.Parameter(torch.randn(3, 4, 6, 5, dtype=torch.cfloat))


class NoisyLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 5, 3
        self.weight_mu = nn.Parameter(torch.randn(3, 5))
        self.weight_sigma = nn.Parameter(torch.randn(3, 5))


class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 5, 3
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.zeros(3))


class GraphAttentionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 5, 3
        self.W = nn.Parameter(torch.randn(5, 3))
        self.a = nn.Parameter(torch.randn(6, 1))


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nf = 3
        self.w = nn.Parameter(torch.randn(5, 3))
        self.b = nn.Parameter(torch.zeros(3))


class DigitCaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(1, 6, 10, 4, 8))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 4, 8))
        self.w2 = nn.Parameter(torch.randn(3, 8, 4))


COPIED: list[tuple[type[nn.Module], dict[str, tuple[int, ...] | None]]] = [
    # class, {parameter: axes of a weight vector, or None if no axes are suggested}
    (KANLinear, {"base_weight": (1,), "spline_weight": (1, 2), "spline_scaler": None}),
    (EqualLinear, {"weight": (1,)}),
    (EqualConv2d, {"weight": (1, 2, 3)}),
    (ModulatedConv2d, {"weight": (2, 3, 4)}),
    (SpectralConv1d, {"weights1": (0,)}),
    (SpectralConv2d, {"weights1": (0,), "weights2": (0,)}),
    (NoisyLinear, {"weight_mu": (1,), "weight_sigma": None}),
    (GraphConvolution, {"weight": (0,)}),
    (GraphAttentionLayer, {"W": (0,), "a": (0,)}),
    (Conv1D, {"w": (0,)}),
    (DigitCaps, {"W": (1, 4)}),
    (Experts, {"w1": (1,), "w2": (1,)}),
]


@pytest.mark.parametrize(("cls", "expected"), COPIED, ids=[cls.__name__ for cls, _ in COPIED])
def test_probable_axes_are_suggested_for_well_known_classes(
    cls: type[nn.Module], expected: dict[str, tuple[int, ...] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(cls())
    before = weight_layout(model)
    assert [entry.name for entry in before.unknown] == [f"0.{name}" for name in expected]  # never centered unasked
    monkeypatch.setattr("gradcentral.layout.rules._registered", {})
    layout = _after("\n".join(before.suggestions), model)
    found = {entry.name: entry.vectors and entry.vectors.span for entry in layout.entries}
    assert {name: found[f"0.{name}"] for name in expected} == expected
    for name in expected:
        (line,) = [code for code in before.suggestions if f'"{name}"' in code]
        assert ("to check; None to skip it" in line) is (expected[name] is not None)


@pytest.mark.parametrize(
    ("layer", "suggested"),
    [
        (EqualLinear(5, 3), '"o [i]"'),
        (_changed_shape(EqualLinear(5, 3), 5, 3), "None"),  # its bias contradicts the shape
        (_changed_shape(ModulatedConv2d(), 4, 3, 3, 3), '"o [i k k]"'),
        (_changed_shape(ModulatedConv2d(), 3, 4, 3, 3), "None"),
        (_changed_shape(GraphConvolution(), 3, 5), "None"),
        (type("Mine", (nn.Linear,), {})(6, 4), ""),
        (_changed_shape(type("Mine", (nn.Linear,), {})(6, 4), 6, 4), '"[i] o"'),
        (_changed_shape(type("Mine", (nn.Linear,), {})(6, 4), 6, 5), "None"),
        (_changed_shape(type("Mine", (nn.Conv2d,), {})(4, 6, (3, 5)), 3, 5, 4, 6), '"[k... i] o"'),
        (_changed_shape(type("Mine", (nn.Conv2d,), {})(4, 6, 3, groups=2), 3, 3, 2, 6), '"[k... i] o"'),
        (_changed_shape(type("Mine", (nn.Bilinear,), {})(4, 5, 3), 4, 5, 3), '"[i j] o"'),
    ],
)
def test_probable_axes_agree_with_the_sizes_of_the_layer(layer: nn.Module, suggested: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    code = "\n".join(weight_layout(model).suggestions)
    rule = re.search(r'"(?:layer\.)?weight"[:,] (.*?)[)}]', code)
    assert (rule[1] if rule else "") == suggested


def test_the_scaled_weights_of_progan_have_the_axes_of_their_layer() -> None:
    """A hook computes ``weight`` from ``weight_orig``."""
    layer = nn.Conv2d(3, 4, 3)
    layer.register_parameter("weight_orig", nn.Parameter(layer.weight.detach()))
    del layer._parameters["weight"]
    (code,) = weight_layout(nn.Sequential(layer)).suggestions
    assert '{"0.weight_orig": "o [i k...]"}' in code


# Flat weights


class LinearOfPaths(nn.Module):
    """As in e3nn: the weights of all paths in one axis."""

    def __init__(self, size: int = 48, name: str = "weight", bias: int = 0) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(size)))
        if bias:
            self.bias = nn.Parameter(torch.zeros(bias))


@pytest.mark.parametrize("name", ["weight", "weights", "w", "W", "kernel", "params", "flat_weights", "weight_ih", "w1"])
def test_flat_weights_of_an_unknown_layer_are_unknown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(LinearOfPaths(48, name, bias=6))
    layout = weight_layout(model)
    assert [entry.name for entry in layout.unknown] == [f"0.{name}"]
    (code,) = layout.suggestions
    assert '"(2 [i])"' in code
    monkeypatch.setattr("gradcentral.layout.rules._registered", {})
    assert _after(code.replace("None", '"(6 [i])"', 1), model)[f"0.{name}"].fan_in == 8


def _named(name: str, module: nn.Module) -> nn.Module:
    return nn.ModuleDict({name: module})


@pytest.mark.parametrize(
    "model",
    [
        _named("layer", LinearOfPaths(48, "bias")),
        _named("layer", LinearOfPaths(48, "scale")),
        _named("layer", LinearOfPaths(48, "gain")),
        _named("layer", LinearOfPaths(48, "weight_scale")),
        _named("layer", LinearOfPaths(48, "layer_weights")),
        _named("layer", LinearOfPaths(3, "weight")),  # coefficients of a mixture
        _named("layer", LinearOfPaths(48, "weight", bias=48)),  # an affine map of each channel
        _named("norm1", LinearOfPaths()),
        _named("ln_1", LinearOfPaths()),
        _named("layer", type("RMSNorm", (LinearOfPaths,), {})()),
        _named("layer", type("Normalize", (LinearOfPaths,), {})()),
        _named("layer", type("LayerScale", (LinearOfPaths,), {})()),
        _named("layer", type("PReLU6", (LinearOfPaths,), {})()),
        nn.ParameterDict({"weight_bias": torch.zeros(48)}),
    ],
)
def test_gains_and_biases_of_unknown_layers_are_not_unknown(model: nn.Module) -> None:
    assert not weight_layout(model).unknown


def test_biases_with_several_axes_are_recognized_by_their_names() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 4))
            self.gate_bias = nn.Parameter(torch.zeros(3, 4))
            self.biases = nn.ParameterList([torch.zeros(1, 4)])
            self.bias_projection = nn.Parameter(torch.zeros(3, 4))

    layout = weight_layout(Layer())
    assert [entry.name for entry in layout.unknown] == ["bias_projection"]
    assert {layout.skipped[name] for name in ("bias", "gate_bias", "biases.0")} == {"bias"}


# Parameters of unusual shapes


def _of(tensor: Tensor) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(tensor)
    return model


def test_the_reasons_name_the_shape_as_it_is() -> None:
    assert weight_layout(_of(torch.zeros(()))).skipped["weight"] == "a single number"
    assert WeightLayout.from_shapes([torch.zeros(())]).skipped == {"0": "a single number"}
    empty = nn.Linear(1, 3)
    empty.in_features, empty.weight = 0, nn.Parameter(torch.zeros(3, 0))
    assert weight_layout(empty).skipped["weight"] == "fan-in 0: empty"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_skipped(layout: torch.layout) -> None:
    model = _of(torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout))
    found = weight_layout(model)
    assert found.skipped["weight"] == "nested tensor: its parts differ in shape"
    assert re.search(r"^weight +\? ", str(found), re.M)
    assert as_json(model, found)["parameters"][0]["shape"] is None
    assert WeightLayout.from_shapes(model.parameters()).skipped == {"0": found.skipped["weight"]}
