"""Hugging Face PEFT, as of version 0.21.

The layers of LoRA are Linear and convolution layers in a ModuleDict, which the rules of torch.nn cover.
"""

import gradcentral.layout.reasons as skip
from gradcentral.layout.reasons import each
from gradcentral.layout.rules import LeaveAlone, LibraryTable, axes

_FACTOR = LeaveAlone("factor of a matrix product, not the weights of a unit")
_OTHER_BASIS = LeaveAlone("coefficients in another basis")
_ROTATION = LeaveAlone("parameter of a rotation")

TABLE: LibraryTable = {
    # LoRA on the raw parameter of experts: [out, rank · experts], with the expert innermost.
    "*.lora.layer.ParamWrapper": {"lora_B.*.weight": axes("o ([i] e)", e="num_experts")},
    "*.LoraEmbeddingATPHolder": {"weight": skip.LOOKUP},
    "*.Dora*Layer": {"weight": LeaveAlone("magnitude of DoRA")},
    "*.BlockDiagonalLinear": {"weight": axes("o [i]")},
    **each({"weight": _ROTATION}, "*.OFTRotationModule *.OrthLayer"),
    "*.Glora*Path": {"X*": _FACTOR},
    "*.MultitaskPromptEmbedding": {"prefix_task_*": skip.PROMPT},
    "*.PolyRouter": {"module_logits": skip.MIXING},
    "*.CartridgeEncoder": {"*_embedding": skip.PROMPT},
    "*AdaptedAttention*": {"adaption_prompt": skip.PROMPT},
    "tuners.adalora.*": {"lora_[AB].*": axes("o [i]"), "lora_E.*": LeaveAlone("singular values")},
    "tuners.*": {
        "lora_embedding_A.*": skip.LOOKUP,
        "lora_embedding_B.*": axes("o [i]"),
        "lora_magnitude_vector.*": LeaveAlone("magnitude of DoRA"),
        **each(_FACTOR, "hada_*.* lokr_*.* hira_*.* delora_*.* deft_*.* gralora_*.* adamss_*.* adamss_*.*.*"),
        **each(_FACTOR, "miss_block.* randlora_*.* poly_lora_*.* frod_*.*"),
        **each(_ROTATION, "boft_R.* hra_u.* road_*.*"),
        **each(skip.SCALE, "boft_s.* ia3_l.* *vera_lambda_*.*"),
        **each(_OTHER_BASIS, "c3a_kernel.* *_spectrum.* vblora_*.* tinylora_*.* unilora_theta_d.*"),
        **each(LeaveAlone("sparse entries of a weight"), "shira_weight.* supertuning_values.*"),
        "trainable_tokens_delta.*": skip.TOKEN,
        "beft_bias.*": skip.BIAS,
    },
}
