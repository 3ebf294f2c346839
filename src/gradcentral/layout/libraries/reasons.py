"""Why parameters that are no weights are left alone, and the names under which libraries keep them."""

from __future__ import annotations

from gradcentral.layout.rules import LeaveAlone, Rules

__all__ = [
    "ACTIVATION",
    "BIAS",
    "CODEBOOK",
    "DYNAMICS",
    "LOOKUP",
    "MIXING",
    "NAMES",
    "NORM_GAIN",
    "POSITION",
    "PROMPT",
    "QUERY",
    "RELATIVE",
    "SCALE",
    "TEMPERATURE",
    "TOKEN",
]

ACTIVATION = LeaveAlone("parameter of an activation")
BIAS = LeaveAlone("bias")
CODEBOOK = LeaveAlone("codebook: a row is one code, not a unit's weights")
DYNAMICS = LeaveAlone("state-space dynamics, no weights")
LOOKUP = LeaveAlone("lookup table: a row is one token's vector, not a unit's weights")
MIXING = LeaveAlone("mixing coefficients")
NORM_GAIN = LeaveAlone("gain of a normalization")
POSITION = LeaveAlone("position embedding")
PROMPT = LeaveAlone("learned prompt")
QUERY = LeaveAlone("learned query or latent")
RELATIVE = LeaveAlone("relative position table")
SCALE = LeaveAlone("scale or shift of a channel, head or branch")
TEMPERATURE = LeaveAlone("temperature")
TOKEN = LeaveAlone("learned token")

NAMES: Rules = {
    "*token": TOKEN,
    "*tokens": TOKEN,
    "*_token[0-9]": TOKEN,
    "class_emb*": TOKEN,
    "mask_emb*": TOKEN,
    "*register*": TOKEN,
    "*pos_emb*": POSITION,
    "*position*_embed*": POSITION,
    "position_encoding*": POSITION,
    "rel_pos*": RELATIVE,
    "*relative_position*": RELATIVE,
    "attention_biases": RELATIVE,
    "layer_scale*": SCALE,
    "*scale_shift_table": SCALE,
    "gamma*": SCALE,
    "*logit_scale*": TEMPERATURE,
    "temperature": TEMPERATURE,
    "latents": QUERY,
    "*bias": BIAS,
}
"""What is left alone in any library whose classes were read. A name is no evidence of weights, so none centers."""
