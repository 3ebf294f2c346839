"""Parameters without their model: the layout equals that of the model that holds them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import gradcentral
from gradcentral import WeightLayout, centralize, weight_layout
from gradcentral.layout.search import find_models


class Generator(nn.Module):
    """Layers that the shape rule centers wrongly: a table, a transposed convolution and weights stored as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.up = nn.ConvTranspose2d(4, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 2)


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = 1
        self.layer = nn.ConvTranspose2d(4, 3, 3)


def _tied() -> nn.Module:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["table"].weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Generator,
    "one layer": lambda: nn.Linear(3, 2),
    "wrapped": lambda: nn.ModuleDict({"module": Generator()}),
    "compiled": lambda: cast("nn.Module", torch.compile(Generator(), backend="eager")),
    "tied": _tied,
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.ConvTranspose1d(4, 3, 3)), nn.Linear(3, 2)),
    "raw parameters": lambda: nn.ModuleList([nn.ParameterList([torch.zeros(3, 4)]), nn.Linear(3, 2)]),
    "slots": Slotted,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.Linear(3, 2)),
}


def _decisions(layout: WeightLayout) -> list[Any]:
    return [(e.name, e.aliases, e.parameter, e.vectors, e.origin, e.reason) for e in layout.entries]


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_equals_that_of_the_model(name: str) -> None:
    model = MODELS[name]()
    expected = _decisions(weight_layout(model))
    assert _decisions(WeightLayout.from_parameters(model.parameters())) == expected
    assert _decisions(WeightLayout.from_parameters(model.named_parameters())) == expected
    assert _decisions(gradcentral.SGD(model.parameters(), lr=0.1).layout) == expected
    assert _decisions(centralize(torch.optim.SGD(model.parameters(), lr=0.1)).layout) == expected


def test_models_on_the_meta_device_are_found() -> None:
    with torch.device("meta"):
        model = Generator()
    assert _decisions(WeightLayout.from_parameters(model.parameters())) == _decisions(weight_layout(model))


def test_groups_with_and_without_weight_decay_are_found() -> None:
    model = Generator()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = gradcentral.AdamW(groups, lr=0.1)
    assert _decisions(optimizer.layout) == _decisions(weight_layout(model))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_a_part_of_a_model_has_the_names_of_the_whole() -> None:
    net = Generator()
    model = nn.ModuleDict({"net": net})
    optimizer = gradcentral.SGD(net.head.parameters(), lr=0.1)
    assert optimizer.layout.names[net.head.weight] == "net.head.weight"
    del model


def test_copies_of_a_model_are_not_confused_with_it() -> None:
    model = Generator()
    average = copy.deepcopy(model)
    assert find_models([*model.parameters()]) == [model]
    assert find_models([*average.parameters()]) == [average]


def test_among_models_that_share_parameters_the_one_with_most_of_them_is_found() -> None:
    body = nn.Linear(4, 4)
    heads = [nn.Linear(4, 2), nn.Linear(4, 3)]
    models = [nn.ModuleDict({"body": body, "head": head}) for head in heads]
    larger = nn.ModuleDict({"body": body, "head": nn.Linear(4, 2), "extra": nn.Linear(4, 2)})
    for model in (*models, larger):
        assert find_models([*model.parameters()]) == [model]
    assert find_models([*body.parameters()])[0] in models  # rather than the larger one
    both = [*models[0].parameters(), *heads[1].parameters()]
    assert find_models(both) == models
    names = WeightLayout.from_parameters(both).names
    assert names[heads[1].weight] == "1.head.weight"
    assert names[body.weight] == "0.body.weight"


def test_an_optimizer_of_two_models_centers_both() -> None:
    models = [Generator(), nn.Linear(4, 2)]
    optimizer = gradcentral.SGD([p for model in models for p in model.parameters()], lr=0.1)
    for number, model in enumerate(models):
        expected = [(f"{number}.{name}", p, vectors) for name, _, p, vectors, *_ in _decisions(weight_layout(model))]
        assert set(expected) <= {(e.name, e.parameter, e.vectors) for e in optimizer.layout.entries}


def test_modules_in_a_plain_list_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.ConvTranspose2d(4, 3, 3), nn.Linear(3, 2)]

    layers = Net().layers
    layout = WeightLayout.from_parameters([p for layer in layers for p in layer.parameters()])
    assert list(layout.names.values()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert layout["0.weight"].pattern == weight_layout(layers[0])["weight"].pattern


def test_options_select_parameters_by_name() -> None:
    model = Generator()
    layout = WeightLayout.from_parameters(
        model.parameters(), overrides={"table.weight": "o [i]"}, exclude=["head.*"], only="conv"
    )
    expected = weight_layout(model, overrides={"table.weight": "o [i]"}, exclude=["head.*"], only="conv")
    assert _decisions(layout) == _decisions(expected)
    assert [layout.names[p] for p in layout] == ["table.weight", "up.weight"]
    with pytest.raises(ValueError, match="exclude: 'heed.weight' matches no .* did you mean 'head.weight'"):
        WeightLayout.from_parameters(model.parameters(), exclude=["heed.weight"])


def test_parameters_that_no_module_holds_follow_the_shape_rule() -> None:
    model, loose = Generator(), [torch.zeros(5, 2, requires_grad=True), torch.zeros(5, requires_grad=True)]
    with pytest.warns(UserWarning, match=r"no module was found that holds the parameters of shape \(5, 2\):") as caught:
        layout = WeightLayout.from_parameters([*model.parameters(), *loose])
    assert caught[0].filename == __file__
    assert _decisions(layout)[:-2] == _decisions(weight_layout(model))
    assert layout[loose[0]].span == (1,)
    assert layout.is_guessed(loose[0])
    assert not layout.is_guessed(model.up.weight)
    layout.refresh()
    assert loose[0] in layout
    WeightLayout.from_parameters(loose[1:])  # without weights there is nothing to guess


def test_layers_added_later_are_found() -> None:
    for kind in ("with its model", "a copy", "another model"):
        model: Any = nn.Sequential(nn.Linear(4, 6))
        optimizer = gradcentral.SGD(model.parameters(), lr=0.1)
        if kind == "a copy":
            model, optimizer = copy.deepcopy((model, optimizer))
        added = nn.ConvTranspose2d(4, 3, 3)
        if kind != "another model":
            model.append(added)
        optimizer.add_param_group({"params": added.parameters()})
        assert optimizer.layout[added.weight] == weight_layout(added)["weight"]
        for p in (model[0].weight, added.weight):
            p.grad = torch.randn_like(p)
        means = [
            gradcentral.center(p.detach(), optimizer.layout[p]) - p.detach() for p in (model[0].weight, added.weight)
        ]
        optimizer.step()
        for p, mean in zip((model[0].weight, added.weight), means, strict=True):
            torch.testing.assert_close(gradcentral.center(p.detach(), optimizer.layout[p]) - p.detach(), mean)


def test_a_pickled_optimizer_keeps_its_layout() -> None:
    model = Generator()
    model, optimizer = pickle.loads(pickle.dumps((model, gradcentral.SGD(model.parameters(), lr=0.1))))
    assert _decisions(optimizer.layout) == _decisions(weight_layout(model))


def test_the_model_is_not_kept_alive() -> None:
    model = Generator()
    alive = weakref.ref(model)
    layer = weakref.ref(model.head)
    optimizer = gradcentral.SGD(model.parameters(), lr=0.1)
    handle = centralize(torch.optim.SGD(model.parameters(), lr=0.1))
    del model
    gc.collect()
    assert alive() is None
    assert layer() is None
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()  # the layout stays
    assert len(handle.layout) == 2


def test_unusual_objects_do_not_disturb_the_search() -> None:
    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise AssertionError("the search must not run code of other objects")

    proxy, unfinished = Proxy(), nn.Module.__new__(nn.Linear)
    model = Generator()
    assert find_models([*model.parameters()]) == [model]
    del proxy, unfinished
