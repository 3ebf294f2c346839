"""open_clip, as of version 3.3."""

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LibraryTable, axes

TABLE: LibraryTable = {
    "transformer.Attention": {"in_proj_weight": axes("o [i]"), "head_scale": skip.SCALE},
    "transformer.AttentionalPooler": {"query": skip.QUERY},
    "transformer.VisionTransformer": {"proj": axes("[i] o")},
    "transformer.*Transformer": {"text_projection": axes("[i] o")},
    # CLIP keeps the projection of its text tower as an attribute of its own.
    "*.CLIP": {"text_projection": axes("[i] o")},
    "*": {**skip.NAMES, "cls_emb": skip.TOKEN},
}
