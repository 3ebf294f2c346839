"""How a layout is decided: overrides, rules, ties, lazy parameters, and what is reported."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from gradcentral import LeaveAlone, WeightLayout, WeightVectors, register_layout, weight_layout


class Attention(nn.Module):
    """A model with raw parameters, a submodule of its own and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.project = nn.Parameter(torch.zeros(4, 3))
        self.experts = nn.ParameterList([torch.zeros(3, 5), torch.zeros(3, 5)])
        self.head = nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.ones(4))


def test_unknown_raw_parameters_are_left_alone_and_reported() -> None:
    layout = weight_layout(Attention())
    assert [e.name for e in layout.unknown] == ["cls_token", "project", "experts.0", "experts.1"]
    assert layout.skipped["project"] == "no rule for Attention.project"
    assert layout.skipped["gain"] == "one-dimensional"
    assert [layout.names[p] for p in layout] == ["head.weight"]
    assert "have a look" in layout.summary()


def test_registered_rules_hold_for_subclasses_and_lists() -> None:
    class Mine(Attention):
        pass

    class Child(Mine):
        pass

    register_layout(Mine, "project", WeightVectors((0,)))
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
    [(Tensor, None, "class of torch.nn.Module"), (Attention, "rows", "must be WeightVectors")],
)
def test_register_refuses_what_is_no_rule(cls: type, rule: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_layout(cls, "weight", rule)  # type: ignore[arg-type]


def test_overrides_by_name_pattern_and_parameter() -> None:
    model = Attention()
    rows = WeightVectors((1,))
    layout = weight_layout(model, overrides={"experts.*": rows, "experts.1": None, model.project: WeightVectors((0,))})
    assert layout["experts.0"].span == (1,)
    assert "experts.1" in layout.skipped  # the later override is the exception to the earlier one
    assert layout[model.project].fan_in == 4
    assert next(e.origin for e in layout.entries if e.name == "project") == "override"


def test_exclude_by_name_pattern_parameter_and_module() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert [layout_name(model, e) for e in (["0.*"], [model[1]], [model[0].weight], "1.1.weight")] == [
        ["1.0.weight", "1.1.weight"],
        ["0.weight"],
        ["1.0.weight", "1.1.weight"],
        ["0.weight", "1.0.weight"],
    ]


def layout_name(model: nn.Module, exclude: object) -> list[str]:
    layout = weight_layout(model, exclude=exclude)  # type: ignore[arg-type]
    return [layout.names[p] for p in layout]


def test_only_conv() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3), nn.Linear(4, 3))
    layout = weight_layout(model, only="conv")
    assert [layout.names[p] for p in layout] == ["0.weight", "1.weight"]
    assert layout.skipped["2.weight"] == 'no convolution (only="conv")'


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"only": "linear"}, ValueError, "only must be one of 'all', 'conv', not 'linear'"),
        ({"exclude": ["heed.weight"]}, ValueError, "'heed.weight' matches no parameter.*did you mean 'head.weight'"),
        ({"overrides": {"hed.weight": None}}, ValueError, "overrides: 'hed.weight' matches no parameter"),
        ({"exclude": [nn.Linear(2, 2)]}, ValueError, "a Linear matches no parameter"),
        ({"overrides": {"project": (0,)}}, TypeError, r"overrides\['project'\] must be WeightVectors"),
        (
            {"overrides": {"project": WeightVectors((2,))}},
            ValueError,
            "overrides: project: span .* axis 2 is out of range",
        ),
        ({"overrides": {"project": WeightVectors((0,), view=(1, 12))}}, ValueError, "project of shape .* fan-in 1"),
        ({"overrides": {"project": lambda m, t: 3}}, TypeError, "overrides: project: must return WeightVectors"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weight_layout(Attention(), **options)  # type: ignore[arg-type]


def test_no_model() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not generator"):
        weight_layout(Attention().parameters())  # type: ignore[arg-type]


def test_a_failing_rule_names_the_parameter() -> None:
    class Broken(Attention):
        pass

    register_layout(Broken, "project", WeightVectors((3,)))
    with pytest.raises(ValueError, match="0.project: the rule for registered Broken.project: span"):
        weight_layout(nn.Sequential(Broken()))


def test_tied_parameters_whose_owners_disagree_are_left_alone() -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    layout = weight_layout(model)
    assert layout.skipped == {
        "embedding.weight": "tied: Embedding (embedding.weight) and Linear (head.weight) read it differently"
    }
    assert weight_layout(model, overrides={"head.weight": WeightVectors((1,))})["embedding.weight"].fan_in == 4


def test_tied_parameters_whose_owners_agree_are_centered_once() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    layout = weight_layout(nn.Sequential(one, two))
    assert len(layout) == 1
    assert layout["0.weight"] is layout["1.weight"]


def test_a_module_used_twice_is_no_tie() -> None:
    shared = nn.Linear(4, 4)
    assert len(weight_layout(nn.Sequential(shared, nn.ReLU(), shared))) == 1


def test_lazy_parameters_wait_for_the_first_forward() -> None:
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


def test_integer_parameters_are_left_alone() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    assert weight_layout(model).skipped["weight"] == "dtype int8 has no mean"


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):  # FSDP1 needs a process group; its name is what is looked at
        def __init__(self) -> None:
            super().__init__()
            self._flat_param = nn.Parameter(torch.zeros(12))

    with pytest.raises(ValueError, match=r"1 is wrapped in FullyShardedDataParallel.*fully_shard"):
        weight_layout(nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel()))


def test_layout_does_not_keep_the_model_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    layout = weight_layout(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    layout.refresh()
    assert len(layout) == 1


def test_layout_is_a_mapping_of_the_centered_parameters() -> None:
    model = Attention()
    layout = weight_layout(model)
    assert list(layout) == [model.head.weight]
    assert len(layout) == 1
    assert model.head.weight in layout
    assert model.head.bias not in layout
    assert layout.knows(model.head.bias)
    assert layout.get(model.head.bias) is None
    with pytest.raises(KeyError, match="no parameter of this layout's model"):
        layout[torch.zeros(3)]
    with pytest.raises(KeyError, match="'nothing' is no parameter"):
        layout["nothing"]


def test_from_shapes_is_the_shape_rule() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.ConvTranspose2d(4, 3, 2), nn.Linear(1, 3))
    optimizer = torch.optim.SGD(model.parameters())
    for params in (model.parameters(), model.named_parameters(), optimizer.param_groups):
        layout = WeightLayout.from_shapes(params)
        assert [v.span for v in layout.values()] == [(1,), (1, 2, 3)]
        assert list(layout.skipped.values()) == [
            "one-dimensional",
            "fan-in 1: centering would zero its gradient for ever",
            "one-dimensional",
        ]
    assert "0.weight" in WeightLayout.from_shapes(model.named_parameters())
    with pytest.raises(TypeError, match="params must hold tensors"):
        WeightLayout.from_shapes(["weight"])  # type: ignore[arg-type]


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3))
    assert len(weight_layout(model)) == 2
