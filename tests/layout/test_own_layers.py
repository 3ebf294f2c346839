"""Custom layers: class attributes, and rules for submodules."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from gradcentral import LeaveAlone, WeightVectors, register_layout, weight_layout
from gradcentral.layout import axes


class Declared(nn.Module):
    """A layer that declares its weight vectors."""

    weight_vectors: ClassVar = {
        "weight": "[i] o",
        "scale": LeaveAlone("a scale"),
        "items.*": lambda module, tensor: WeightVectors((tensor.ndim - 1,)),
    }

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.scale = nn.Parameter(torch.zeros(1, 4))
        self.items = nn.ParameterList([torch.zeros(5, 6)])
        self.other = nn.Parameter(torch.zeros(2, 2, 2))


def test_a_class_can_declare_its_weight_vectors() -> None:
    layout = weight_layout(nn.Sequential(Declared()))
    assert layout["0.weight"].span == (0,)
    assert layout["0.items.0"].span == (1,)
    assert layout.skipped["0.scale"] == "a scale"
    assert [entry.name for entry in layout.unknown] == ["0.other"]
    assert layout.entries[0].origin == "declared Declared.weight"


def test_a_registered_rule_takes_precedence_over_a_declared_one() -> None:
    class Mine(Declared):
        pass

    class Child(Mine):
        weight_vectors: ClassVar = {"weight": WeightVectors((1,))}

    register_layout(Mine, "weight", None)
    assert "weight" in weight_layout(Mine()).skipped
    assert weight_layout(Child())["weight"].span == (1,)  # the class itself takes precedence over its bases
    assert weight_layout(Child())["items.0"].span == (1,)


def test_declared_values_that_are_not_rules_are_refused() -> None:
    class Wrong(Declared):
        weight_vectors: ClassVar = {"weight": (0,)}

    with pytest.raises(TypeError, match=r"Wrong.weight_vectors\['weight'\] must be a pattern"):
        weight_layout(Wrong())


def test_unrelated_attributes_of_the_same_name_are_ignored() -> None:
    class Foreign(nn.Linear):
        @property
        def weight_vectors(self) -> int:
            return 3

    assert weight_layout(Foreign(4, 3))["weight"].span == (1,)


def test_rules_can_refer_to_parameters_of_submodules() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 6)
            self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    register_layout(Mixture, "experts.*.weight", "(3 o) [i]")
    register_layout(Mixture, "*", None)  # matches only the module's own parameters, and it has none
    layout = weight_layout(nn.Sequential(Mixture()))
    assert layout["0.shared.weight"].fan_in == 4
    assert layout["0.experts.1.weight"].view == (3, 2, 4)


def test_rules_can_take_the_sizes_of_split_axes_from_the_module() -> None:
    class Grouped(nn.Module):
        weight_vectors: ClassVar = {"weight": axes("(g [i]) o [k...]", g="groups", k="kernel_size")}

        def __init__(self, groups: int) -> None:
            super().__init__()
            self.groups, self.kernel_size = groups, (5, 5)
            self.weight = nn.Parameter(torch.zeros(8, 3, 5, 5))

    patterns = [weight_layout(Grouped(groups))["weight"].pattern for groups in (1, 2)]
    assert patterns == ["[i] o [k k]", "(2 [i]) o [k k]"]
    reason = "shape (8, 3, 5, 5) does not fit Grouped: expected '(g [i]) o [k...]' with g = groups = 3, k = kernel_size"
    assert weight_layout(Grouped(3)).unknown[0].reason == f"{reason} = (5, 5)"


def test_repeated_layers_share_a_row() -> None:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block(), block(), nn.Sequential(nn.Linear(4, 4))])})
    text = str(weight_layout(model))
    assert "blocks.{0..2}.0.weight ×3" in text
    assert "blocks.3.0.weight  " in text
    assert "4 of 14 parameters are centered" in text
    every = weight_layout(model).table(every=True)
    assert "×3" not in every
    assert "blocks.1.1.bias" in every


def test_frozen_parameters_are_marked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    text = str(weight_layout(model))
    assert "Linear.weight; not trained" in text
    assert "2 of 4 parameters are centered (80.0% of the elements); of the trained ones, 1 of 2" in text
