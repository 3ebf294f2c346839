"""Theorem 4.1 of the paper for the libraries' own layers, in float64.

After any number of GC steps, adding a constant γ to all inputs of a unit changes its output by γ·Σw⁰. For layers inside
a nonlinear block, the equivalent property of one gradient is tested: if all inputs of a unit are equal, its gradient is
constant along each weight vector, so the centered gradient is zero.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcentral import WeightLayout, center, centralize, weight_layout
from tests.zoo.checks import library

GAMMA = 0.7

Apply = Callable[[Any, Tensor], Tensor]


def _train(layer: nn.Module, apply: Apply, x: Tensor, layout: WeightLayout | None = None) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    centralize(optimizer, None if layout else layer, layout=layout)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(apply(layer, x).tanh().square().sum())
        optimizer.step()


def _violation(before: nn.Module, after: nn.Module, apply: Apply, x: Tensor, sums: Callable[[Any], Tensor]) -> float:
    change = apply(after, x + GAMMA) - apply(after, x)
    return float((change - GAMMA * sums(before)).detach().abs().max())


def _make(module: str, name: str, *args: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library(module.partition(".")[0])
        layer: nn.Module = getattr(library(module), name)(*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.double()


_MODELS = "transformers.models"
_CODES = torch.tensor([1, 2, 3])
_ROUTING = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
_TYPES = torch.tensor([0, 2, 1, 1, 0])
_LOOPS = torch.arange(5).repeat(2, 1)

# layer, input size, function that applies it, Σw of each unit, whether the shape rule is correct
LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Apply, Callable[[Any], Tensor], bool]] = {
    "transformers Conv1D": (
        lambda: _make("transformers.pytorch_utils", "Conv1D", 4, 6),
        (5, 6),
        lambda m, x: m(x),
        lambda m: m.weight.sum(0),
        False,
    ),
    "Moshi FlexibleLinear": (
        lambda: _make(f"{_MODELS}.moshi.modeling_moshi", "MoshiFlexibleLinear", 6, 4, 3),
        (5, 3, 6),
        lambda m, x: m(x),
        lambda m: m.weight.sum(2),
        False,
    ),
    "CSM codebooks": (
        lambda: _make(f"{_MODELS}.csm.modeling_csm", "CsmCodebooksHead", 6, 4, 7),
        (5, 3, 6),
        lambda m, x: m(x, _CODES),
        lambda m: m.weight.sum(1),
        False,
    ),
    "ConvBERT grouped linear": (
        lambda: _make(f"{_MODELS}.convbert.modeling_convbert", "GroupedLinearLayer", 6, 8, 2),
        (5, 3, 6),
        lambda m, x: m(x),
        lambda m: m.weight.sum(1).flatten(),
        False,
    ),
    "JetMoE experts": (
        lambda: _make(f"{_MODELS}.jetmoe.modeling_jetmoe", "JetMoeParallelExperts", 2, 6, 4),
        (5, 6),
        lambda m, x: m(x, [2, 3]),
        lambda m: m.weight.sum(2).repeat_interleave(torch.tensor([2, 3]), 0),
        False,
    ),
    "timm CondConv2d": (
        lambda: _make("timm.layers", "CondConv2d", 4, 6, 3, groups=2, num_experts=2),
        (2, 4, 6, 6),
        lambda m, x: m(x, _ROUTING)[:, :, 1:-1, 1:-1],
        lambda m: (_ROUTING @ m.weight.reshape(2, 6, 2 * 3 * 3).sum(2))[:, :, None, None],
        False,
    ),
    "PyG Linear": (
        lambda: _make("torch_geometric.nn", "Linear", 6, 4),
        (5, 6),
        lambda m, x: m(x),
        lambda m: m.weight.sum(1),
        True,
    ),
    "PyG HeteroLinear": (
        lambda: _make("torch_geometric.nn", "HeteroLinear", 6, 4, num_types=3),
        (5, 6),
        lambda m, x: m(x, _TYPES),
        lambda m: m.weight.sum(1)[_TYPES],
        False,
    ),
    "PyG RGCN, one relation per edge": (
        lambda: _make("torch_geometric.nn", "RGCNConv", 6, 4, num_relations=3),
        (5, 6),
        lambda m, x: m(x, _LOOPS, _TYPES),
        lambda m: m.weight.sum(1)[_TYPES] + m.root.sum(0),
        False,
    ),
    "PyG RGCN, blocks": (
        lambda: _make("torch_geometric.nn", "RGCNConv", 6, 4, num_relations=3, num_blocks=2, root_weight=False),
        (5, 6),
        lambda m, x: m(x, _LOOPS, _TYPES),
        lambda m: m.weight.sum(2).flatten(1)[_TYPES],
        False,
    ),
    "PyG DNA grouped linear": (
        lambda: _make("torch_geometric.nn.conv.dna_conv", "Linear", 6, 4, groups=2),
        (5, 6),
        lambda m, x: m(x),
        lambda m: m.weight.sum(1).flatten(),
        False,
    ),
    "PyG GCNII": (
        lambda: _make("torch_geometric.nn", "GCN2Conv", 6, alpha=0.0, theta=1.0, layer=1, normalize=False),
        (5, 6),
        lambda m, x: m(x, x, _LOOPS) - (1 - m.beta) * x,
        lambda m: m.beta * m.weight1.sum(0),
        False,
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_theorem_holds_for(name: str) -> None:
    make, size, apply, sums, shape_rule_right = LINEAR[name]
    torch.manual_seed(0)
    before, x = make(), torch.randn(*size, dtype=torch.float64)
    after = copy.deepcopy(before)
    _train(after, apply, x + 0.5)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert _violation(before, after, apply, x, sums) < 1e-9

    by_shape = copy.deepcopy(before)
    rule = WeightLayout.from_shapes(p for p in by_shape.parameters() if p.ndim > 1)
    _train(by_shape, apply, x + 0.5, rule)
    assert (_violation(before, by_shape, apply, x, sums) < 1e-4) is shape_rule_right


def _config(name: str, **options: Any) -> Any:
    config = getattr(library("transformers"), name)(**options)
    config._experts_implementation = "eager"
    return config


def _experts(model: str, name: str, config: str, **options: Any) -> nn.Module:
    sizes = {"hidden_size": 6, "intermediate_size": 5, "moe_intermediate_size": 5}
    return _make(f"{_MODELS}.{model}.modeling_{model}", name, _config(config, **sizes, **options))


def _routed(layer: Any, x: Tensor) -> Tensor:
    """Route every token to every expert, with different weights."""
    count = layer.gate_up_proj.shape[0]
    chosen = torch.arange(count).expand(len(x), count)
    return layer(x, chosen, torch.rand(len(x), count, dtype=x.dtype) + 0.5)  # type: ignore[no-any-return]


def _by_expert(layer: Any, x: Tensor) -> Tensor:
    return layer(x.repeat(layer.num_experts, 1))  # type: ignore[no-any-return]


def _xlnet(layer: Any, x: Tensor) -> Tensor:
    """Apply to [tokens, batch, model]; the positions, inputs of ``r``, are constant along their features too."""
    position = torch.randn(2 * len(x), x.shape[1], 1, dtype=x.dtype).expand(-1, -1, x.shape[-1])
    mask = torch.zeros(len(x), len(x), x.shape[1], 1, dtype=x.dtype)
    return layer(x, None, mask, None, position, None)[0]  # type: ignore[no-any-return]


Inside = tuple[Callable[[], nn.Module], tuple[int, ...], Apply, dict[str, tuple[str, ...]]]
# layer, input size, function that applies it, {parameter: parameters to make constant so that its inputs are equal}
INSIDE: dict[str, Inside] = {
    "Mixtral experts": (
        lambda: _experts("mixtral", "MixtralExperts", "MixtralConfig", num_local_experts=3),
        (7, 6),
        _routed,
        {"gate_up_proj": (), "down_proj": ("gate_up_proj",)},
    ),
    "Qwen3-MoE experts": (
        lambda: _experts("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", num_experts=3),
        (7, 6),
        _routed,
        {"gate_up_proj": (), "down_proj": ("gate_up_proj",)},
    ),
    "GPT-OSS experts": (
        lambda: _experts("gpt_oss", "GptOssExperts", "GptOssConfig", num_local_experts=3),
        (7, 6),
        _routed,
        {"gate_up_proj": (), "down_proj": ("gate_up_proj", "gate_up_proj_bias")},
    ),
    "Llama 4 experts": (
        lambda: _experts("llama4", "Llama4TextExperts", "Llama4TextConfig", num_local_experts=3),
        (7, 6),
        _by_expert,
        {"gate_up_proj": (), "down_proj": ("gate_up_proj",)},
    ),
    "XLNet attention": (
        lambda: _make(
            f"{_MODELS}.xlnet.modeling_xlnet",
            "XLNetRelativeAttention",
            _config("XLNetConfig", d_model=8, n_head=2, dropout=0),
        ),
        (5, 2, 8),
        _xlnet,
        {"q": (), "k": (), "v": (), "r": (), "o": ("q", "k", "v", "r", "r_w_bias", "r_r_bias")},
    ),
    "timm multi-query attention": (
        lambda: _make("timm.layers.attention2d", "MultiQueryAttentionV2", 6, 5, num_heads=2, key_dim=3, value_dim=4),
        (2, 6, 3, 3),
        lambda m, x: m(x),
        {"query_proj": (), "key_proj": (), "value_proj": (), "out_proj": ("query_proj", "value_proj")},
    ),
    "PyG GAT": (
        lambda: _make("torch_geometric.nn", "GATConv", 6, 4, heads=2),
        (5, 6),
        lambda m, x: m(x, torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])),
        {"lin.weight": (), "att_src": ("lin.weight",), "att_dst": ("lin.weight",)},
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_the_centered_gradient_is_zero_for_equal_inputs(name: str) -> None:
    make, size, apply, parameters = INSIDE[name]
    for parameter, constant in parameters.items():
        torch.manual_seed(0)
        layer = make()
        layer.eval()
        with torch.no_grad():
            for other in constant:
                layer.get_parameter(other).fill_(0.3)
        # Inputs differ between tokens and are equal along the features (axis 1 of an image).
        features = 1 if len(size) == 4 else -1
        x = torch.randn(size, dtype=torch.float64).mean(features, keepdim=True).expand(size).contiguous()
        output = apply(layer, x)
        torch.autograd.backward((output * torch.randn_like(output)).sum())
        gradient = layer.get_parameter(parameter).grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-6, f"{parameter} receives no gradient"
        remains = center(gradient, weight_layout(layer)[parameter])
        assert remains.abs().max() < 1e-9 * gradient.abs().max(), f"{parameter}: the layout has the wrong axis"
