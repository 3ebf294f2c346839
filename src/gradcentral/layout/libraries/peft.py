"""Hugging Face PEFT. Read in version 0.21.

The layers of LoRA are Linear and convolution layers in a ModuleDict, which the rules of torch.nn cover.
"""

from __future__ import annotations

from torch import Tensor, nn

from gradcentral.layout.libraries.reasons import BIAS, LOOKUP, MIXING, PROMPT, SCALE, TOKEN
from gradcentral.layout.rules import Decision, LeaveAlone, LibraryTable
from gradcentral.layout.shapes import unexpected_shape, weights
from gradcentral.weight_vectors import WeightVectors

__all__ = ["TABLE"]


def _lora_b_of_experts(module: nn.Module, tensor: Tensor) -> Decision:
    """[out, rank · experts]: LoRA on a raw parameter of experts keeps their B side by side, the expert innermost."""
    experts = getattr(module, "num_experts", None)
    if tensor.ndim != 2 or not isinstance(experts, int) or tensor.shape[1] % experts:
        return unexpected_shape(module, tensor, f"[out, rank · num_experts], num_experts = {experts}")
    return WeightVectors(span=(1,), view=(tensor.shape[0], tensor.shape[1] // experts, experts))


_FACTOR = LeaveAlone("factor of a product of matrices: no unit's weights")
_ROTATION = LeaveAlone("parameter of a rotation")
_SPECTRUM = LeaveAlone("coefficients in another basis")

TABLE: LibraryTable = {
    "*.lora.layer.ParamWrapper": {"lora_B.*.weight": _lora_b_of_experts},
    "*.LoraEmbeddingATPHolder": {"weight": LOOKUP},
    "*.Dora*Layer": {"weight": LeaveAlone("magnitude of DoRA")},
    "*.BlockDiagonalLinear": {"weight": weights("o i")},
    "*.OFTRotationModule": {"weight": _ROTATION},
    "*.OrthLayer": {"weight": _ROTATION},
    "*.Glora*Path": {"X*": _FACTOR},
    "*.MultitaskPromptEmbedding": {"prefix_task_*": PROMPT},
    "*.PolyRouter": {"module_logits": MIXING},
    "*.CartridgeEncoder": {"*_embedding": PROMPT},
    "*AdaptedAttention*": {"adaption_prompt": PROMPT},
    "tuners.adalora.*": {"lora_[AB].*": weights("o i"), "lora_E.*": LeaveAlone("singular values")},
    "tuners.*": {
        "lora_embedding_A.*": LOOKUP,
        "lora_embedding_B.*": weights("o i"),
        "lora_magnitude_vector.*": LeaveAlone("magnitude of DoRA"),
        "hada_*.*": _FACTOR,
        "lokr_*.*": _FACTOR,
        "hira_*.*": _FACTOR,
        "delora_*.*": _FACTOR,
        "deft_*.*": _FACTOR,
        "gralora_*.*": _FACTOR,
        "adamss_*.*": _FACTOR,
        "adamss_*.*.*": _FACTOR,
        "miss_block.*": _FACTOR,
        "randlora_*.*": _FACTOR,
        "poly_lora_*.*": _FACTOR,
        "frod_*.*": _FACTOR,
        "boft_R.*": _ROTATION,
        "boft_s.*": SCALE,
        "hra_u.*": _ROTATION,
        "road_*.*": _ROTATION,
        "ia3_l.*": SCALE,
        "*vera_lambda_*.*": SCALE,
        "c3a_kernel.*": _SPECTRUM,
        "*_spectrum.*": _SPECTRUM,
        "vblora_*.*": _SPECTRUM,
        "tinylora_*.*": _SPECTRUM,
        "unilora_theta_d.*": _SPECTRUM,
        "shira_weight.*": LeaveAlone("sparse entries of a weight"),
        "supertuning_values.*": LeaveAlone("sparse entries of a weight"),
        "trainable_tokens_delta.*": TOKEN,
        "beft_bias.*": BIAS,
    },
}
