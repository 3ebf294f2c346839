"""Hugging Face PEFT, as of version 0.21.

The layers of LoRA are Linear and convolution layers in a ModuleDict, which the rules of torch.nn cover.
"""

import gradcentral.layout.reasons as skip
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes

_ROTATION = LeaveAlone("parameter of a rotation")

TABLE: LibraryTable = {
    # LoRA on the raw parameter of experts: [out, rank · experts], with the expert innermost.
    "*.lora.layer.ParamWrapper": {"lora_B.*.weight": axes("o ([i] e)", e="num_experts")},
    "*.LoraEmbeddingATPHolder": {"weight": skip.LOOKUP},
    "*.Dora*Layer": {"weight": LeaveAlone("magnitude of DoRA")},
    "*.BlockDiagonalLinear": {"weight": axes("o [i]")},
    "*.OFTRotationModule": {"weight": _ROTATION},
    "*.OrthLayer": {"weight": _ROTATION},
    "*.Glora*Path": {"X*": LeaveAlone("factor of a matrix product, not the weights of a unit")},
    "*.MultitaskPromptEmbedding": {"prefix_task_*": skip.PROMPT},
    "*.PolyRouter": {"module_logits": skip.MIXING},
    "*.CartridgeEncoder": {"*_embedding": skip.PROMPT},
    "*AdaptedAttention*": {"adaption_prompt": skip.PROMPT},
    "tuners.adalora.*": {"lora_[AB].*": axes("o [i]"), "lora_E.*": LeaveAlone("singular values")},
    "tuners.*": {
        "lora_embedding_A.*": skip.LOOKUP,
        "lora_embedding_B.*": axes("o [i]"),
        "lora_magnitude_vector.*": LeaveAlone("magnitude of DoRA"),
        **skip.each(
            "factor of a matrix product, not the weights of a unit",
            "hada_*.* lokr_*.* hira_*.* delora_*.* deft_*.* gralora_*.* adamss_*.* adamss_*.*.* miss_block.* "
            "randlora_*.* poly_lora_*.* frod_*.*",
        ),
        **skip.each(_ROTATION, "boft_R.* hra_u.* road_*.*"),
        **skip.each(skip.SCALE, "boft_s.* ia3_l.* *vera_lambda_*.*"),
        **skip.each(
            "coefficients in another basis", "c3a_kernel.* *_spectrum.* vblora_*.* tinylora_*.* unilora_theta_d.*"
        ),
        **skip.each("sparse entries of a weight", "shira_weight.* supertuning_values.*"),
        "trainable_tokens_delta.*": skip.TOKEN,
        "beft_bias.*": skip.BIAS,
    },
}
