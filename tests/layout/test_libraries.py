"""Rule tables of libraries that are not installed: a class's path selects the table, its sizes check the rule."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from gradcentral import WeightVectors, weight_layout
from gradcentral.layout.lookup import LIBRARIES


def _layer(path: str, parameters: dict[str, tuple[int, ...]], **attributes: object) -> nn.Module:
    """Return a layer as the library defines it, without the library."""
    module, _, name = path.rpartition(".")
    layer: nn.Module = type(name, (nn.Module,), {"__module__": module, "__qualname__": name})()
    for parameter, shape in parameters.items():
        layer.register_parameter(parameter, nn.Parameter(torch.zeros(shape)))
    for attribute, value in attributes.items():
        setattr(layer, attribute, value)
    return layer


_EXPERTS = "transformers.models.some_moe.modeling_some_moe.SomeMoeExperts"
_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts"
_BOTH = {"gate_up_proj": (3, 10, 8), "down_proj": (3, 8, 5)}
_TURNED = {"gate_up_proj": (3, 8, 10), "down_proj": (3, 5, 8)}
_SQUARE = {"gate_up_proj": (3, 8, 8), "down_proj": (3, 8, 8)}


def test_every_library_has_a_table() -> None:
    for library in LIBRARIES:
        assert importlib.import_module(f"gradcentral.layout.libraries.{library}").TABLE


def test_no_library_is_imported() -> None:
    code = f"""
import sys, torch
from gradcentral.layout.lookup import LIBRARIES, library_rules
for library in LIBRARIES:
    library_rules(type("Layer", (), {{"__module__": library + ".models"}}))
print([name for name in {LIBRARIES!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "shapes", "attributes", "span"),
    [
        (_EXPERTS, _BOTH, {"is_transposed": False, "intermediate_dim": 5}, 2),
        (_EXPERTS, _TURNED, {"is_transposed": True, "intermediate_dim": 5}, 1),
        (_EXPERTS, _BOTH, {"intermediate_dim": 5}, 2),  # the sizes decide
        (_EXPERTS, _TURNED, {"intermediate_size": 5}, 1),
        (_EXPERTS, _SQUARE, {"is_transposed": True}, 1),  # the module's flag decides
        (_EXPERTS, _SQUARE, {"is_transposed": False}, 2),
        (_GPT_OSS, _SQUARE, {}, 1),  # the table decides
        (_GPT_OSS, _SQUARE, {"is_transposed": False}, 2),  # the module's own attribute takes precedence
        ("transformers.models.mixtral.modeling_mixtral.MixtralExperts", _SQUARE, {}, 2),
        ("transformers.models.moved.elsewhere.Llama4TextExperts", _SQUARE, {}, 1),
    ],
)
def test_experts_stored_in_either_order(
    path: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, object], span: int
) -> None:
    layout = weight_layout(_layer(path, shapes, **attributes))
    assert {name: layout[name].span for name in shapes} == dict.fromkeys(shapes, (span,))


@pytest.mark.parametrize(
    ("path", "shapes", "attributes", "reason"),
    [
        (_EXPERTS, _SQUARE, {}, "may be stored as 'e o [i]' or as 'e [i] o'"),
        (_EXPERTS, {"down_proj": (3, 4, 4)}, {"intermediate_dim": 4}, "may be stored as"),
        (_EXPERTS, _BOTH, {"is_transposed": True, "intermediate_dim": 5}, "does not fit SomeMoeExperts"),
        (_GPT_OSS, _BOTH, {"intermediate_size": 5}, "a hidden layer of"),
        (_EXPERTS, _BOTH, {"intermediate_dim": 7}, "a hidden layer of 14 units"),
        (_EXPERTS, {"gate_up_proj": (10, 8)}, {}, "three axes"),
        (
            "transformers.pytorch_utils.Conv1D",
            {"weight": (8, 3)},
            {"nf": 8, "nx": 3},
            "expected '[i] o' with i = nx = 3",
        ),
        ("timm.layers.cond_conv2d.CondConv2d", {"weight": (3, 50)}, {"weight_shape": (2, 2, 3, 3)}, "weight_shape"),
        ("transformers.models.xlnet.Moved.XLNetRelativeAttention", {"q": (8, 8)}, {}, "'[i] h o'"),
    ],
)
def test_parameters_that_do_not_fit_their_rule_are_unknown(
    path: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, object], reason: str
) -> None:
    layout = weight_layout(_layer(path, shapes, **attributes))
    assert len(layout) == 0
    assert len(layout.unknown) == len(shapes)
    assert any(reason in skipped for skipped in layout.skipped.values()), layout.skipped


def test_subclasses_defined_by_users_inherit_the_rule() -> None:
    base = _layer("transformers.pytorch_utils.Conv1D", {"weight": (8, 3)}, nf=3, nx=8)
    mine = type("Mine", (type(base),), {})()
    mine.weight = nn.Parameter(torch.zeros(8, 3))
    layout = weight_layout(mine)
    assert layout["weight"].span == (0,)
    assert layout.entries[0].origin == "transformers Mine.weight"


def test_a_parameter_is_not_centered_because_of_its_name() -> None:
    layer = _layer("transformers.models.new.modeling_new.NewAttention", {"o_proj": (4, 4), "cls_token": (1, 1, 4)})
    layout = weight_layout(layer)
    assert [entry.name for entry in layout.unknown] == ["o_proj"]
    assert layout.skipped["cls_token"] == "learned token"
    # Outside the known libraries, the same name has no meaning.
    assert len(weight_layout(_layer("mine.Attention", {"cls_token": (1, 1, 4)})).unknown) == 1


def test_only_conv_includes_the_convolutions_of_libraries() -> None:
    conv = _layer("timm.layers.cond_conv2d.CondConv2d", {"weight": (3, 36)}, weight_shape=(2, 2, 3, 3))
    conv1d = _layer("transformers.pytorch_utils.Conv1D", {"weight": (8, 3)})
    layout = weight_layout(nn.Sequential(conv, conv1d), only="conv")
    assert layout["0.weight"] == WeightVectors((2, 3, 4), view=(3, 2, 2, 3, 3), shape=(3, 36))
    assert "not a convolution" in layout.skipped["1.weight"]


def test_lora_on_experts_keeps_the_experts_separate() -> None:
    wrapper = _layer("peft.tuners.lora.layer.ParamWrapper", {}, num_experts=3)
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(6, 12, bias=False)})
    wrapper.lora_B = nn.ModuleDict({"default": nn.Linear(12, 5, bias=False)})
    layout = weight_layout(nn.Sequential(wrapper))
    assert layout["0.lora_A.default.weight"].span == (1,)
    assert layout["0.lora_B.default.weight"] == WeightVectors((1,), view=(5, 4, 3), shape=(5, 12))


def test_a_router_that_also_selects_shared_experts() -> None:
    path = "transformers.models.inkling.modeling_inkling.InklingTopkRouter"
    router = _layer(path, {"weight": (10, 8)}, num_experts=8, n_total_experts=10, hidden_dim=8)
    assert weight_layout(router)["weight"].fan_in == 8


def test_numbered_tokens_are_skipped() -> None:
    layer = _layer("timm.models.crossvit.CrossVit", {"cls_token_0": (1, 1, 8), "cls_token_1": (1, 1, 4)})
    assert {*weight_layout(layer).skipped.values()} == {"learned token"}
