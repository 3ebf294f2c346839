"""Reasons to skip parameters that are not weights, and the names that libraries give such parameters."""

from __future__ import annotations

from typing import TypeVar

from gradcentral.layout.rules import LeaveAlone, Rules

_Rule = TypeVar("_Rule")

ACTIVATION = LeaveAlone("parameter of an activation")
BIAS = LeaveAlone("bias")
CODEBOOK = LeaveAlone("codebook: a row is one code, not the weights of a unit")
DYNAMICS = LeaveAlone("state-space dynamics, not weights")
LOOKUP = LeaveAlone("lookup table: a row is the vector of one token, not the weights of a unit")
MIXING = LeaveAlone("mixing coefficients")
NORM_GAIN = LeaveAlone("gain of a normalization")
POSITION = LeaveAlone("position embedding")
PROMPT = LeaveAlone("learned prompt")
QUERY = LeaveAlone("learned query or latent")
RELATIVE = LeaveAlone("relative position table")
SCALE = LeaveAlone("scale or shift of a channel, head or branch")
TEMPERATURE = LeaveAlone("temperature")
TOKEN = LeaveAlone("learned token")


def each(rule: _Rule, names: str) -> dict[str, _Rule]:
    """Return one rule for several parameters, or one set of rules for several classes, named in ``names``."""
    return dict.fromkeys(names.split(), rule)


NAMES: Rules = {
    **each(TOKEN, "*token *tokens *_token[0-9] class_emb* mask_emb* *register*"),
    **each(POSITION, "*pos_emb* *position*_embed* position_encoding*"),
    **each(RELATIVE, "rel_pos* *relative_position* attention_biases"),
    **each(SCALE, "layer_scale* *scale_shift_table gamma*"),
    **each(TEMPERATURE, "*logit_scale* temperature"),
    "latents": QUERY,
    "*bias": BIAS,
}
"""Parameters skipped in every library that has a table. No parameter is centered because of its name alone."""
