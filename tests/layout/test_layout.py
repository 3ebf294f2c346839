"""Deciding a layout: overrides, rules, tied parameters, lazy parameters, and reports."""

from __future__ import annotations

import copy
import gc
import importlib
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from gradcentral import LeaveAlone, WeightLayout, WeightVectors, register_layout, weight_layout


class Attention(nn.Module):
    """A model with raw parameters, a list of them and a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.project = nn.Parameter(torch.zeros(4, 3))
        self.experts = nn.ParameterList([torch.zeros(3, 5), torch.zeros(3, 5)])
        self.head = nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.ones(4))


def test_raw_parameters_without_a_rule_are_skipped_and_reported() -> None:
    layout = weight_layout(Attention())
    assert [e.name for e in layout.unknown] == ["cls_token", "project", "experts.0", "experts.1"]
    assert layout.skipped["project"] == "no rule for Attention.project"
    assert layout.skipped["gain"] == "one-dimensional"
    assert [layout.names[p] for p in layout] == ["head.weight"]
    assert "4 skipped as unknown" in layout.summary()


def test_registered_rules_apply_to_subclasses_and_lists() -> None:
    class Mine(Attention):
        pass

    class Child(Mine):
        pass

    register_layout(Mine, "project", "[i] o")
    register_layout(Mine, "experts.*", lambda module, tensor: WeightVectors((tensor.ndim - 2,)))
    register_layout(Mine, "cls_token", LeaveAlone("a token"))
    layout = weight_layout(Child())
    assert {layout.names[p]: v.span for p, v in layout.items()} == {
        "project": (0,),
        "experts.0": (0,),
        "experts.1": (0,),
        "head.weight": (1,),
    }
    assert layout.skipped["cls_token"] == "a token"
    assert not layout.unknown
    register_layout(Child, "project", None)
    assert "project" in weight_layout(Child()).skipped
    assert "project" in weight_layout(Mine())


@pytest.mark.parametrize(
    ("cls", "rule", "message"),
    [
        (Tensor, None, "subclass of torch.nn.Module"),
        (Attention, (1,), r"must be a pattern such as '\[i\] o', WeightVectors, LeaveAlone, None or a function"),
        (Attention, "rows", "rule for Attention.weight: pattern 'rows': put brackets around"),
    ],
)
def test_register_layout_refuses_invalid_rules(cls: type, rule: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        register_layout(cls, "weight", rule)  # type: ignore[arg-type]


def test_every_kind_of_rule_that_is_named_in_the_refusal_is_accepted() -> None:
    with pytest.raises(TypeError, match="must be a pattern") as refused:
        weight_layout(Attention(), overrides={"project": 1})  # type: ignore[dict-item]
    (pattern,) = re.findall(r"such as '(.*?)'", str(refused.value))
    rules = (pattern, WeightVectors((0,)), LeaveAlone("why"), None, lambda module, tensor: pattern)
    layouts = [weight_layout(Attention(), overrides={"project": rule}) for rule in rules]
    assert ["project" in layout for layout in layouts] == [True, True, False, False, True]


def test_overrides_by_name_pattern_and_parameter() -> None:
    model = Attention()
    rows = WeightVectors((1,))
    layout = weight_layout(model, overrides={"experts.*": rows, "experts.1": None, model.project: "[i] o"})
    assert layout["experts.0"].span == (1,)
    assert "experts.1" in layout.skipped  # the later override is the exception to the earlier one
    assert layout[model.project].fan_in == 4
    assert next(e.origin for e in layout.entries if e.name == "project") == "override"


def test_exclude_by_name_pattern_parameter_and_module() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert [_centered_names(model, e) for e in (["0.*"], [model[1]], [model[0].weight], "1.1.weight")] == [
        ["1.0.weight", "1.1.weight"],
        ["0.weight"],
        ["1.0.weight", "1.1.weight"],
        ["0.weight", "1.0.weight"],
    ]


def _centered_names(model: nn.Module, exclude: object) -> list[str]:
    layout = weight_layout(model, exclude=exclude)  # type: ignore[arg-type]
    return [layout.names[p] for p in layout]


def test_only_conv_centers_convolutions_of_any_dimension() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3), nn.Linear(4, 3), nn.Conv1d(3, 4, 3))
    layout = weight_layout(model, only="conv")
    assert [layout.names[p] for p in layout] == ["0.weight", "1.weight", "3.weight"]
    assert layout.skipped["2.weight"] == 'not a convolution (only="conv")'


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"only": "linear"}, ValueError, "unknown only='linear'; choose from 'all', 'conv'"),
        ({"exclude": ["heed.weight"]}, ValueError, "'heed.weight' matches no parameter.*did you mean 'head.weight'"),
        ({"overrides": {"hed.weight": None}}, ValueError, "overrides: 'hed.weight' matches no parameter"),
        ({"exclude": [nn.Linear(2, 2)]}, ValueError, "a Linear matches no parameter"),
        ({"overrides": {"project": (0,)}}, TypeError, r"overrides\['project'\] must be a pattern"),
        ({"overrides": {"project": "o i"}}, ValueError, r"overrides\['project'\]: pattern 'o i': put brackets"),
        (
            {"overrides": {"project": "o [i k]"}},
            ValueError,
            r"overrides: project: pattern 'o \[i k\]' for shape \(4, 3\): the pattern has 3 axes, but the shape has 2",
        ),
        (
            {"overrides": {"project": WeightVectors((2,))}},
            ValueError,
            "overrides: project: span .* axis 2 is out of range",
        ),
        ({"overrides": {"project": WeightVectors((0,), view=(1, 12))}}, ValueError, "project of shape .* fan-in 1"),
        ({"overrides": {"project": lambda m, t: 3}}, TypeError, "overrides: project: must return a pattern"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weight_layout(Attention(), **options)  # type: ignore[arg-type]


def test_options_that_are_suggested_in_a_refusal_are_accepted() -> None:
    with pytest.raises(ValueError, match="choose from") as refused:
        weight_layout(Attention(), only="linear")
    for only in re.findall(r"'(\w+)'", str(refused.value).partition("choose from")[2]):
        weight_layout(Attention(), only=only)
    with pytest.raises(ValueError, match="did you mean") as refused:
        weight_layout(Attention(), exclude=["heed.weight"])
    names = re.findall(r"'([\w.]+)'", str(refused.value).partition("did you mean")[2])
    assert "head.weight" not in weight_layout(Attention(), exclude=names)


_ODD_NAMES = ["w[0]", "w0", "a*", "ab", "[user]", "u", '"', "'", "\\", "ü😀", "\n", "x?", "xy"]


@pytest.mark.parametrize("name", _ODD_NAMES)
def test_a_name_with_wildcard_characters_selects_its_parameter_alone(name: str) -> None:
    model = nn.ParameterDict({odd: torch.zeros(3, 4) for odd in _ODD_NAMES})
    assert [model[name]] == [*weight_layout(model, overrides={name: "o [i]"})]
    others = weight_layout(model, overrides={"*": "o [i]"}, exclude=[name])
    assert len(others) == len(_ODD_NAMES)  # an override takes precedence over exclude
    excluded = weight_layout(model, exclude=[name])
    assert [entry.name for entry in excluded.entries if entry.reason == "excluded"] == [name]


def test_brackets_in_the_name_of_a_module_are_not_wildcards() -> None:
    model = nn.ModuleDict({"[user]": nn.Linear(3, 2), "item": nn.Linear(3, 2), "u": nn.Linear(3, 2)})
    assert _centered_names(model, ["[user].*"]) == ["item.weight", "u.weight"]
    assert _centered_names(model, ["[iu]*.weight"]) == ["[user].weight"]


def test_a_rule_for_an_exact_name_takes_precedence_over_wildcards() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("w[0]", nn.Parameter(torch.zeros(3, 4)))
            self.register_parameter("w", nn.Parameter(torch.zeros(3, 4)))

    register_layout(Odd, "w*", "o [i]")
    register_layout(Odd, "w[0]", "[i] o")
    assert {name: weight_layout(Odd())[name].fan_in for name in ("w[0]", "w")} == {"w[0]": 3, "w": 4}


def test_parameters_instead_of_a_model_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not generator"):
        weight_layout(Attention().parameters())  # type: ignore[arg-type]


def test_the_error_of_a_rule_names_the_parameter() -> None:
    class Broken(Attention):
        pass

    register_layout(Broken, "project", WeightVectors((3,)))
    with pytest.raises(ValueError, match="0.project: the rule for registered Broken.project: span"):
        weight_layout(nn.Sequential(Broken()))


def test_tied_parameters_that_their_owners_use_differently_are_skipped() -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    layout = weight_layout(model)
    assert layout.skipped == {
        "embedding.weight": "tied: Embedding (embedding.weight) and Linear (head.weight) use it differently"
    }
    assert weight_layout(model, overrides={"head.weight": "o [i]"})["embedding.weight"].fan_in == 4


def test_tied_parameters_that_their_owners_use_alike_are_centered_once() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    layout = weight_layout(nn.Sequential(one, two))
    assert len(layout) == 1
    assert layout["0.weight"] is layout["1.weight"]


def test_a_module_that_is_used_twice_is_not_a_tie() -> None:
    shared = nn.Linear(4, 4)
    assert len(weight_layout(nn.Sequential(shared, nn.ReLU(), shared))) == 1


def test_lazy_parameters_are_skipped_until_the_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 2))
    layout = weight_layout(model)
    assert layout.pending
    assert "first forward" in layout.skipped["0.weight"]
    assert "?" in str(layout)
    model[0](torch.zeros(2, 5))
    layout.refresh()
    assert layout["0.weight"].fan_in == 5
    assert layout.pending
    model[1](torch.zeros(1, 4, 3, 3))
    layout.refresh()
    assert layout["1.weight"].fan_in == 16
    assert not layout.pending


def test_a_copy_made_before_the_first_forward_must_be_created_again() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    copied = copy.deepcopy((model, weight_layout(model)))
    copied[0](torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="create the layout and the optimizer again"):
        copied[1].refresh()
    assert weight_layout(copied[0])["0.weight"].fan_in == 5


def test_integer_parameters_are_skipped() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    assert weight_layout(model).skipped["weight"] == "dtype int8 has no mean"


def test_fsdp1_is_refused_and_the_suggested_function_keeps_the_layout() -> None:
    class FullyShardedDataParallel(nn.Module):  # FSDP1 needs a process group; it is recognized by its name
        def __init__(self) -> None:
            super().__init__()
            self._flat_param = nn.Parameter(torch.zeros(12))

    with pytest.raises(ValueError, match=r"1 is wrapped in FullyShardedDataParallel.*fully_shard") as refused:
        weight_layout(nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel()))
    (path,) = re.findall(r"use ([\w.]+) \(FSDP2\)", str(refused.value))
    module, _, name = path.rpartition(".")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2)
        getattr(importlib.import_module(module), name)(model, mesh=init_device_mesh("cpu", (1,)))
        assert weight_layout(model)["weight"].fan_in == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("attributes", "maker"),
    [({"_fsdp_flattened": True}, "FullyShardedDataParallel"), ({"ds_id": 0, "ds_shape": (3, 4)}, "DeepSpeed ZeRO-3")],
)
def test_flat_parts_of_parameters_are_refused(attributes: dict[str, object], maker: str) -> None:
    model = nn.Linear(4, 3)
    for name, value in attributes.items():
        setattr(model.weight, name, value)
    for create in (lambda: weight_layout(model), lambda: WeightLayout.from_shapes(model.named_parameters())):
        with pytest.raises(ValueError, match=f"weight of shape .* is a flat part of a parameter, made by {maker}"):
            create()


def test_a_layout_does_not_keep_the_model_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    layout = weight_layout(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    layout.refresh()
    assert len(layout) == 1


def test_a_layout_is_a_mapping_of_the_centered_parameters() -> None:
    model = Attention()
    layout = weight_layout(model)
    assert list(layout) == [model.head.weight]
    assert len(layout) == 1
    assert model.head.weight in layout
    assert model.head.bias not in layout
    assert layout.in_model(model.head.bias)
    assert layout.get(model.head.bias) is None
    with pytest.raises(KeyError, match="a tensor of shape .* is not a parameter of the model"):
        layout[torch.zeros(3)]
    with pytest.raises(KeyError, match="'nothing' is not a parameter"):
        layout["nothing"]


def test_from_shapes_applies_the_shape_rule() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.ConvTranspose2d(4, 3, 2), nn.Linear(1, 3))
    optimizer = torch.optim.SGD(model.parameters())
    for params in (model.parameters(), model.named_parameters(), optimizer.param_groups):
        layout = WeightLayout.from_shapes(params)
        assert [v.span for v in layout.values()] == [(1,), (1, 2, 3)]
        assert list(layout.skipped.values()) == [
            "one-dimensional",
            "fan-in 1: its centered gradient is always zero",
            "one-dimensional",
        ]
    assert "0.weight" in WeightLayout.from_shapes(model.named_parameters())
    with pytest.raises(TypeError, match="params must hold tensors"):
        WeightLayout.from_shapes(["weight"])  # type: ignore[arg-type]


def test_layouts_work_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3))
    assert len(weight_layout(model)) == 2
