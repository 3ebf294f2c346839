"""PyTorch Geometric. Read in version 2.8."""

from __future__ import annotations

from torch import Tensor, nn

from gradcentral.layout.libraries.reasons import BIAS, CODEBOOK, LOOKUP, MIXING, NORM_GAIN, QUERY, SCALE
from gradcentral.layout.rules import Decision, LeaveAlone, LibraryTable, Rules
from gradcentral.layout.shapes import weights

__all__ = ["TABLE"]


def _relations(module: nn.Module, tensor: Tensor) -> Decision | None:
    """One matrix [in, out] a relation or basis; with ``num_blocks``, one a block of each."""
    rule = weights("r b i o" if getattr(module, "num_blocks", None) is not None else "r i o")
    assert callable(rule)
    return rule(module, tensor)


# The logit of a head is a weighted sum of its channels: one output unit a head.
_HEADS = weights("o o i")
_GAUSSIANS: Rules = {"mu": LeaveAlone("mean of a Gaussian kernel"), "sigma": LeaveAlone("width of a Gaussian kernel")}
_HETERO_NORM: Rules = {"weight": NORM_GAIN, "bias": BIAS}

TABLE: LibraryTable = {
    "nn.conv.dna_conv.Linear": {"weight": weights("g i o")},
    "nn.dense.linear.Linear": {"weight": weights("o i", o="out_channels", i="in_channels")},
    "*.HeteroLinear": {"weight": weights("r i o", i="in_channels", o="out_channels"), "bias": BIAS},
    "*.SparseLinear": {"weight": weights("i o", i="in_channels", o="out_channels")},
    "*RGCNConv": {"weight": _relations, "root": weights("i o", o="out_channels"), "comp": MIXING},
    "*.RGATConv": {
        "weight": _relations,
        "basis": weights("r i o"),
        "att": MIXING,
        "[qke]": weights("i o"),
        "l[12]": weights("i o", o="out_channels"),
        "b[12]": BIAS,
    },
    "*.ARMAConv": {
        "weight": weights("t k i o"),
        "init_weight": weights("k i o"),
        "root_weight": weights("t k i o"),
        "bias": BIAS,
    },
    "*.GatedGraphConv": {"weight": weights("t i o", o="out_channels")},
    "*.GCN2Conv": {"weight[12]": weights("i o", o="channels")},
    "*.GMMConv": {"g": weights("i o"), **_GAUSSIANS},
    # Each control point of the spline is a linear map; an edge uses a weighted mean of them.
    "*.SplineConv": {"weight": weights("k i o", o="out_channels")},
    "*.AntiSymmetricConv": {"W": LeaveAlone("antisymmetric: an element is a weight of two units")},
    "*.GATConv": {"att_*": _HEADS},
    "*.GATv2Conv": {"att": _HEADS},
    "*.SuperGATConv": {"att_[lr]": _HEADS},
    "*.GeneralConv": {"att_msg": _HEADS},
    "*.HypergraphConv": {"att": _HEADS},
    "*.LPAttLayer": {"att": _HEADS},
    "*.DenseGATConv": {"att_*": weights("o o o i")},
    "*.GATEConv": {"att_[lr]": weights("o i")},
    "*.HANConv": {"q": weights("o i", i="out_channels"), "lin_*.*": _HEADS},
    "*.HGTConv": {"p_rel.*": SCALE},
    "*.SelectTopK": {"weight": weights("o i", i="in_channels")},
    "*.DeepGraphInfomax": {"weight": weights("i i")},
    "nn.models.dimenet.InteractionBlock": {"W": weights("o i i")},
    "graphgym.*Conv*Layer": {"weight*": weights("i o", o="out_channels"), "att_msg": _HEADS},
    "*.InducedSetAttentionBlock": {"ind": QUERY},
    "*.PoolingByMultiheadAttention": {"seed": QUERY},
    "*.MemPooling": {"k": CODEBOOK},
    "*.RENet": {"ent": LOOKUP, "rel": LOOKUP},
    "*.HeteroBatchNorm": _HETERO_NORM,
    "*.HeteroLayerNorm": _HETERO_NORM,
    "*.HeteroBasisConv": {"edge_type_weight": MIXING},
    "*.ExpNormalSmearing": {
        "means": LeaveAlone("mean of a radial basis"),
        "betas": LeaveAlone("width of a radial basis"),
    },
    "*.VecLayerNorm": {"weight": NORM_GAIN},
    "*Explainer": {"*_mask": LeaveAlone("mask of an explanation"), "*_mask.*": LeaveAlone("mask of an explanation")},
    "*": {"*bias": BIAS, "edge_type_weight": MIXING, "query_tokens": QUERY},
}
