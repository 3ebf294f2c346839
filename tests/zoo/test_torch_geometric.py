"""PyTorch Geometric: every parameter of its convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.checks import Architecture, Expected, check_classified, check_moves, library

gnn: Any = library("torch_geometric.nn")

_EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 4], [1, 2, 3, 4, 5, 0, 3, 5, 1]])
_KINDS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])


def _nodes() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64)


def _graph(model: nn.Module) -> Any:
    return model(_nodes(), _EDGES)


def _relations(model: nn.Module) -> Any:
    return model(_nodes(), _EDGES, _KINDS)


def _of(name: str, forward: Any, special: Any, *sizes: int, **options: Any) -> Architecture:
    label = " ".join((name, *(f"{option}={value}" for option, value in options.items())))
    return Architecture(label, lambda: getattr(gnn, name)(*sizes, **options), forward, special)


def _heads(*names: str) -> dict[str, Expected]:
    """Return the layout of attention vectors [1, heads, channels]: a head's logit is a sum over its channels."""
    return dict.fromkeys(names, (2,))


_RELATIONAL: dict[str, Expected] = {"weight": (1,), "root": (0,)}

ARCHITECTURES = [
    _of("GCNConv", _graph, {"lin.weight": (1,)}, 8, 4),
    _of("SAGEConv", _graph, {"lin_?.weight": (1,)}, -1, 4),
    _of("GATConv", _graph, {"lin.weight": (1,), **_heads("att_src", "att_dst")}, 8, 4, heads=2),
    _of("GATv2Conv", _graph, {"lin_?.weight": (1,), **_heads("att")}, 8, 4, heads=2),
    _of("SuperGATConv", _graph, {"lin.weight": (1,), **_heads("att_l", "att_r")}, 8, 4, heads=2),
    _of("TransformerConv", _graph, {"lin_*.weight": (1,)}, 8, 4, heads=2),
    _of("RGCNConv", _relations, _RELATIONAL, 8, 4, num_relations=3),
    _of("RGCNConv", _relations, {**_RELATIONAL, "comp": "mixing"}, 8, 4, num_relations=3, num_bases=2),
    _of("RGCNConv", _relations, {**_RELATIONAL, "weight": (2,)}, 8, 4, num_relations=3, num_blocks=2),
    _of(
        "RGATConv",
        _relations,
        {"weight": (1,), "[qk]": (0,), "l2": (0,), "l1": "fan-in 1", "b?": "bias"},
        *(8, 4),
        num_relations=3,
        heads=2,
    ),
    _of("GatedGraphConv", _graph, {"weight": (1,), "rnn.weight_?h": (1,)}, 8, num_layers=2),
    _of(
        "GCN2Conv",
        lambda m: m(_nodes(), _nodes(), _EDGES),
        {"weight?": (0,)},
        8,
        alpha=0.1,
        theta=0.5,
        layer=1,
        shared_weights=False,
    ),
    _of(
        "ARMAConv",
        _graph,
        {"weight": (2,), "root_weight": (2,), "init_weight": (1,), "bias": "bias"},
        *(8, 4),
        num_stacks=2,
        num_layers=3,
    ),
    _of(
        "DNAConv",
        lambda m: m(torch.randn(6, 3, 8, dtype=torch.float64), _EDGES),
        {"multi_head.lin_?.weight": (1,)},
        8,
        heads=2,
        groups=2,
    ),
    _of("AntiSymmetricConv", _graph, {"W": "antisymmetric", "phi.lin.weight": (1,)}, 8),
    _of(
        "GMMConv",
        lambda m: m(_nodes(), _EDGES, torch.rand(9, 2, dtype=torch.float64)),
        {"g": (0,), "mu": "mean", "sigma": "width", "root.weight": (1,)},
        *(8, 4),
        dim=2,
        kernel_size=3,
    ),
    _of(
        "HypergraphConv",
        lambda m: m(_nodes(), _EDGES % 3, hyperedge_attr=torch.randn(3, 8, dtype=torch.float64)),
        {"lin.weight": (1,), **_heads("att")},
        *(8, 4),
        use_attention=True,
        heads=2,
    ),
    _of("HeteroLinear", lambda m: m(_nodes(), _KINDS[:6]), {"weight": (1,), "bias": "bias"}, 8, 4, num_types=3),
    _of("GIN", _graph, {"*.lins.?.weight": (1,)}, 8, 4, num_layers=2),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_parameter_is_classified(architecture: Architecture) -> None:
    check_classified(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_nothing_is_frozen(architecture: Architecture) -> None:
    check_moves(architecture)
