"""Reasons to skip parameters that are not weights, and the names by which such parameters are recognized."""

from __future__ import annotations

import re
from typing import TypeVar

from torch import Tensor, nn

from gradcentral.layout.rules import LeaveAlone, Rules, too_few_axes

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
    **each(TOKEN, "*token *tokens *_token[0-9] *_token_[0-9] class_emb* mask_emb* *register*"),
    **each(POSITION, "*pos_emb* *position*_embed* position_encoding*"),
    **each(RELATIVE, "rel_pos* *relative_position* attention_biases"),
    **each(SCALE, "layer_scale* *scale_shift_table gamma*"),
    **each(TEMPERATURE, "*logit_scale* temperature"),
    "latents": QUERY,
    "*bias": BIAS,
}
"""Parameters skipped in every library that has a table. No parameter is centered because of its name alone."""

_MIN_FLAT = 8  # a layer whose weights are flattened has more of them; fewer are coefficients of a mixture
_WEIGHTS = {
    "weight",
    "weights",
    "w",
    "kernel",
    "kernels",
    "filter",
    "filters",
    "params",
    "parameters",
    "theta",
    "matrix",
}
_NORMS = {"ln", "bn", "gn", "grn", "frn"}
_COEFFICIENTS = {"scale", "scaler", "scaling", "gain", "affine", "gamma", "beta", "alpha", "mix", "mixing", "loss"}
_COEFFICIENTS |= {"activation", "act"}
_TABLES = {"layer", "class", "pos"}  # one coefficient per layer or class


def without_rule(module: nn.Module, cls: type[nn.Module], name: str, path: str, tensor: Tensor) -> LeaveAlone:
    """Return why a parameter without a rule is skipped: it is a bias or has too few axes, or it is unknown.

    Args:
        module: the parameter's owner, defined by ``cls``.
        name: the parameter's name in the module.
        path: the parameter's name in the model.
    """
    attribute, local = ["", "", *(piece for piece in path.split(".") if not piece.isdecimal())][-2:]
    if local.lower().endswith(("bias", "biases")):
        return BIAS
    unknown = LeaveAlone(f"no rule for {cls.__name__}.{name}", unknown=True)
    if tensor.ndim > 1:
        return unknown
    words = _words(local) | _words(cls.__name__)
    is_gain = (
        any(word in _NORMS or word.startswith("norm") or word.endswith("norm") for word in words | _words(attribute))
        or any(word in _COEFFICIENTS or word.endswith("lu") for word in words)
        or bool(_words(local) & _TABLES)
        or getattr(getattr(module, "bias", None), "shape", None) == tensor.shape
    )
    may_be_flat = tensor.ndim == 1 and tensor.numel() >= _MIN_FLAT and _words(local) & _WEIGHTS
    return unknown if may_be_flat and not is_gain else too_few_axes(tensor)


def _words(name: str) -> set[str]:
    """Return the words of a name in snake case or camel case, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
