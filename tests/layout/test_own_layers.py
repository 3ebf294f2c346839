"""A user's own layer: an attribute of the class, rules that reach into submodules, and the lines that are suggested."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from gradcentral import LeaveAlone, WeightVectors, register_layout, weight_layout


class Declared(nn.Module):
    """Says itself what its parameters are."""

    weight_vectors: ClassVar = {
        "weight": WeightVectors((0,)),
        "scale": LeaveAlone("a scale"),
        "items.*": lambda module, tensor: WeightVectors((tensor.ndim - 1,)),
    }

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.scale = nn.Parameter(torch.zeros(1, 4))
        self.items = nn.ParameterList([torch.zeros(5, 6)])
        self.other = nn.Parameter(torch.zeros(2, 2, 2))


class Plain(nn.Module):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(4, 3))
        self.parts = nn.ParameterList([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)])


def test_a_class_declares_its_weight_vectors() -> None:
    layout = weight_layout(nn.Sequential(Declared()))
    assert layout["0.weight"].span == (0,)
    assert layout["0.items.0"].span == (1,)
    assert layout.skipped["0.scale"] == "a scale"
    assert [entry.name for entry in layout.unknown] == ["0.other"]
    assert layout.entries[0].origin == "declared Declared.weight"


def test_a_registered_rule_beats_a_declared_one() -> None:
    class Mine(Declared):
        pass

    class Child(Mine):
        weight_vectors: ClassVar = {"weight": WeightVectors((1,))}

    register_layout(Mine, "weight", None)
    assert "weight" in weight_layout(Mine()).skipped
    assert weight_layout(Child())["weight"].span == (1,)  # the class's own word comes before its bases'
    assert weight_layout(Child())["items.0"].span == (1,)


def test_a_declaration_that_is_no_rule_is_refused() -> None:
    class Wrong(Declared):
        weight_vectors: ClassVar = {"weight": (0,)}

    with pytest.raises(TypeError, match=r"Wrong.weight_vectors\['weight'\] must be WeightVectors"):
        weight_layout(Wrong())


def test_somebody_else_s_attribute_of_that_name_is_not_ours() -> None:
    class Foreign(nn.Linear):
        @property
        def weight_vectors(self) -> int:
            return 3

    assert weight_layout(Foreign(4, 3))["weight"].span == (1,)


def test_a_rule_reaches_into_submodules() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 6)
            self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    register_layout(Mixture, "experts.*.weight", WeightVectors((2,), view=(3, 2, 4)))
    register_layout(Mixture, "*", None)  # one piece: the module's own parameters, of which there are none
    layout = weight_layout(nn.Sequential(Mixture()))
    assert layout["0.shared.weight"].fan_in == 4
    assert layout["0.experts.1.weight"].view == (3, 2, 4)


def test_one_line_is_suggested_for_each_kind_of_unknown_parameter() -> None:
    layout = weight_layout(nn.Sequential(Plain(), Plain()))
    mix, parts = layout.suggestions
    path = f"{Plain.__module__}.Plain"
    assert mix.startswith(f'gradcentral.register_layout({path}, "mix", None)  # 4×3; ')
    assert "span=(0,) if as x @ w" in mix
    assert parts.startswith(f'gradcentral.register_layout({path}, "parts.*", None)  # 2×3×4; ')
    assert mix in str(layout)
    code = mix.replace("None", "gradcentral.WeightVectors(span=(0,))").replace(path, "Mine")
    import gradcentral

    class Mine(Plain):
        pass

    exec(code, {"gradcentral": gradcentral, "Mine": Mine})
    assert weight_layout(Mine())["mix"].span == (0,)


def test_what_cannot_be_named_by_its_class_is_suggested_as_an_override() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 2, 2))
    (line,) = weight_layout(nn.Sequential(layer)).suggestions
    assert line.startswith('gradcentral.weight_layout(model, overrides={"0.weight": None})  # 3×2×2')


def test_layers_that_repeat_share_a_row() -> None:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block(), block(), nn.Sequential(nn.Linear(4, 4))])})
    text = str(weight_layout(model))
    assert "blocks.{0..2}.0.weight ×3" in text
    assert "blocks.3.0.weight  " in text
    assert "4 of 14 parameters are centered" in text
    every = weight_layout(model).table(every=True)
    assert "×3" not in every
    assert "blocks.1.1.bias" in every


def test_what_does_not_train_is_told_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    text = str(weight_layout(model))
    assert "Linear.weight; does not train" in text
    assert "2 of 4 parameters are centered (80.0% of the elements); of those that train, 1 of 2" in text
