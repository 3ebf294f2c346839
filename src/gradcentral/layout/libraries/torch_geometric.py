"""PyTorch Geometric, as of version 2.8."""

from torch import Tensor, nn

import gradcentral.layout.reasons as skip
from gradcentral.layout.reasons import each
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes, unexpected_shape


def _relations(module: nn.Module, tensor: Tensor) -> str | LeaveAlone:
    """Return the pattern for one matrix [in, out] per relation or basis; with ``num_blocks``, per block of each."""
    pattern = "r [i] o" if getattr(module, "num_blocks", None) is None else "r b [i] o"
    return pattern if tensor.ndim == len(pattern.split()) else unexpected_shape(module, tensor, repr(pattern))


# The logit of a head is a weighted sum of its channels: one output unit per head.
_HEADS = axes("o h [i]")

TABLE: LibraryTable = {
    "nn.conv.dna_conv.Linear": {"weight": axes("g [i] o")},
    "nn.dense.linear.Linear": {"weight": axes("o [i]", o="out_channels", i="in_channels")},
    "*.HeteroLinear": {"weight": axes("r [i] o", i="in_channels", o="out_channels")},
    "*.SparseLinear": {"weight": axes("[i] o", i="in_channels", o="out_channels")},
    "*RGCNConv": {"weight": _relations, "root": axes("[i] o", o="out_channels"), "comp": skip.MIXING},
    "*.RGATConv": {
        "weight": _relations,
        "basis": axes("r [i] o"),
        "att": skip.MIXING,
        "[qke]": axes("[i] o"),
        "l[12]": axes("[i] o", o="out_channels"),
        "b[12]": skip.BIAS,
    },
    "*.ARMAConv": {"init_weight": axes("k [i] o"), "*weight": axes("t k [i] o")},
    "*.GatedGraphConv": {"weight": axes("t [i] o", o="out_channels")},
    "*.GCN2Conv": {"weight[12]": axes("[i] o", o="channels")},
    "*.GMMConv": {"g": axes("[i] o"), **each(LeaveAlone("mean or width of a Gaussian kernel"), "mu sigma")},
    # Each control point of the spline is a linear map; an edge uses a weighted mean of them.
    "*.SplineConv": {"weight": axes("k [i] o", o="out_channels")},
    "*.AntiSymmetricConv": {"W": LeaveAlone("antisymmetric: an element is a weight of two units")},
    **each({"att*": _HEADS}, "*.GATConv *.GATv2Conv *.SuperGATConv *.GeneralConv *.HypergraphConv *.LPAttLayer"),
    "*.DenseGATConv": {"att_*": axes("o o o [i]")},
    "*.GATEConv": {"att_[lr]": axes("o [i]")},
    "*.HANConv": {"q": axes("o [i]", i="out_channels"), "lin_*.*": _HEADS},
    "*.HGTConv": {"p_rel.*": skip.SCALE},
    "*.SelectTopK": {"weight": axes("o [i]", i="in_channels")},
    "*.DeepGraphInfomax": {"weight": axes("[i i]")},
    "nn.models.dimenet.InteractionBlock": {"W": axes("o [i i]")},
    "graphgym.*Conv*Layer": {"weight*": axes("[i] o", o="out_channels"), "att_msg": _HEADS},
    "*.InducedSetAttentionBlock": {"ind": skip.QUERY},
    "*.PoolingByMultiheadAttention": {"seed": skip.QUERY},
    "*.MemPooling": {"k": skip.CODEBOOK},
    "*.RENet": {"ent": skip.LOOKUP, "rel": skip.LOOKUP},
    "*.ExpNormalSmearing": each(LeaveAlone("mean or width of a radial basis"), "means betas"),
    **each({"weight": skip.NORM_GAIN}, "*.HeteroBatchNorm *.HeteroLayerNorm *.VecLayerNorm"),
    "*Explainer": each(LeaveAlone("mask of an explanation"), "*_mask *_mask.*"),
    "*": {"*bias": skip.BIAS, "edge_type_weight": skip.MIXING, "query_tokens": skip.QUERY},
}
