"""open_clip. Read in version 3.3."""

from __future__ import annotations

from gradcentral.layouts.reasons import NAMES, QUERY, SCALE, TOKEN
from gradcentral.layouts.rules import LibraryTable
from gradcentral.layouts.shapes import weights

__all__ = ["TABLE"]

TABLE: LibraryTable = {
    "transformer.Attention": {"in_proj_weight": weights("o i"), "head_scale": SCALE},
    "transformer.AttentionalPooler": {"query": QUERY},
    "transformer.VisionTransformer": {"proj": weights("i o")},
    "transformer.*Transformer": {"text_projection": weights("i o")},
    # CLIP keeps its text tower's projection as an attribute of its own.
    "*.CLIP": {"text_projection": weights("i o")},
    "*": {**NAMES, "positional_embedding": NAMES["*pos_emb*"], "cls_emb": TOKEN},
}
