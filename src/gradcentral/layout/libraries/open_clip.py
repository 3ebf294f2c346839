"""open_clip. Read in version 3.3."""

from __future__ import annotations

from gradcentral.layout.libraries.reasons import NAMES, QUERY, SCALE, TOKEN
from gradcentral.layout.rules import LibraryTable
from gradcentral.layout.shapes import weights

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
