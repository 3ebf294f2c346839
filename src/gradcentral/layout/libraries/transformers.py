"""Hugging Face transformers. Read in version 5.23."""

from __future__ import annotations

from torch import Tensor, nn

from gradcentral.layout.libraries.experts import experts
from gradcentral.layout.libraries.reasons import (
    ACTIVATION,
    BIAS,
    CODEBOOK,
    DYNAMICS,
    LOOKUP,
    MIXING,
    NAMES,
    NORM_GAIN,
    POSITION,
    PROMPT,
    QUERY,
    RELATIVE,
    SCALE,
    TEMPERATURE,
    TOKEN,
)
from gradcentral.layout.rules import Decision, LeaveAlone, LibraryTable
from gradcentral.layout.shapes import unexpected_shape, weights
from gradcentral.weight_vectors import WeightVectors

__all__ = ["TABLE"]


def _dbrx_down(module: nn.Module, tensor: Tensor) -> Decision:
    """[experts · inner, hidden], used as ``x @ w`` on each expert's rows: an output unit is a column of them."""
    inner = getattr(module, "ffn_hidden_size", None)
    if tensor.ndim != 2 or not isinstance(inner, int) or tensor.shape[0] % inner:
        return unexpected_shape(module, tensor, f"two axes, the first a multiple of ffn_hidden_size = {inner}")
    return WeightVectors(span=(1,), view=(tensor.shape[0] // inner, inner, tensor.shape[1]))


_HYPER_CONNECTION = {"fn": weights("o i"), "hc_fn": weights("o i")}

TABLE: LibraryTable = {
    "*.Conv1D": {"weight": weights("i o", i="nx", o="nf"), "bias": BIAS},
    # Experts. The others say is_transposed themselves, or their sizes tell.
    "*.GptOssExperts": experts(transposed=True),
    "*.OpenAIPrivacyFilterExperts": experts(transposed=True),
    "*.AriaExperts": experts(transposed=True),
    "*.Llama4TextExperts": experts(transposed=True),
    "*.MixtralExperts": experts(transposed=False),
    "*.LongcatFlashExperts": experts(transposed=False),
    "*.Step3p7Experts": experts(transposed=False),
    "*.InklingSharedExperts": experts(transposed=False),
    "*Experts": experts(),
    "*ParallelExperts": {"weight": weights("e o i", e="num_experts", o="output_size", i="input_size")},
    "*.DbrxExpertGLU": {
        "[wv]1": weights("o i", i="hidden_size"),
        "w2": _dbrx_down,
    },
    "models.*Router": {"weight": weights("o i", o="num_experts", i="hidden_dim")},
    # One linear map a group, layer or codebook.
    "*.GroupedLinearLayer": {"weight": weights("g i o", g="num_groups", i="group_in_dim", o="group_out_dim")},
    "*.CsmCodebooksHead": {"weight": weights("g i o")},
    "*.MoshiFlexibleLinear": {"weight": weights("g o i")},
    "*.KyutaiSpeechToTextFlexibleLinear": {"weight": weights("g o i")},
    "*.RecurrentGemmaRglru": {"*_gate_weight": weights("g i o", g="num_attention_heads", i="block_width")},
    "*.EsmFold2ConfidenceHead": {"*_weight": weights("g i o")},
    # Raw projections.
    "*.XLNetRelativeAttention": {
        "[qkvr]": weights("i o o", i="d_model"),
        "o": weights("o i i", o="d_model"),
        "seg_embed": LeaveAlone("segment embedding"),
    },
    "*.FunnelRelMultiheadAttention": {
        "r_kernel": weights("i o o"),
        "seg_embed": LeaveAlone("segment embedding"),
    },
    "*MultiModalProjector": {"mm_input_projection_weight": weights("i o")},
    "*.OmDetTurboLanguageBackbone": {"text_projection": weights("i o")},
    "*.XCLIPModel": {"prompts_visual_projection": weights("i o")},
    "*.SwiftFormerEfficientAdditiveAttention": {"w_g": weights("i o")},
    "*.AMSoftmaxLoss": {"weight": weights("i o", o="num_labels")},
    "*.EsmFold2Parcae": {"input_matrix_continuous": weights("o i")},
    "*.Glm5NextTextIndexer": {"index_kpool_compress_gate": weights("o i", o="head_dim"), "*_ape": POSITION},
    "*.QuantLinear": {"weight": weights("o i", o="out_features", i="in_features")},
    "*HyperConnection": _HYPER_CONNECTION,
    "*HyperHead": _HYPER_CONNECTION,
    "*.Inkling2DynamicShortConvolution": {"static_weight": weights("i o")},
    # State-space layers.
    "*.ZambaMambaMixer": {
        "x_proj_weight": weights("g o i", g="n_mamba_heads", i="mamba_head_dim"),
        "dt_proj_weight": weights("g o i", g="n_mamba_heads", o="mamba_head_dim"),
    },
    # No weights of units.
    "*.AriaProjector": {"query": QUERY},
    "*.BrosRelationExtractor": {"dummy_node": TOKEN},
    "*.GitModel": {"img_temporal_embedding.*": POSITION},
    "*.AxialPositionEmbeddings": {"weights.*": POSITION},
    "*.SinusoidalPositionalEmbedding": {"weight": POSITION},
    "*.QuantEmbedding": {"weight": LOOKUP},
    "*RelativeLogits": {"proj": RELATIVE},
    "*GRN": {"weight": NORM_GAIN},
    "*NormalizationLayer": {"weight": NORM_GAIN},
    "*.PerceiverMultimodal*": {"padding.*": TOKEN, "mask.*": TOKEN},
    "*.PerceiverEmbeddings": {"latents": QUERY},
    "*.MllamaPrecomputedPositionEmbedding": {"embedding": POSITION},
    "*.XIELUActivation": {"alpha_[pn]": ACTIVATION},
    "*.BayesianDetectorWatermarkedLikelihood": {"*": LeaveAlone("parameter of a watermark detector")},
    "integrations.*": {"*": LeaveAlone("storage of a quantized layer")},
    "*Snake*": {"alpha": ACTIVATION, "beta": ACTIVATION},
    "*.VitsElementwiseAffine": {"translate": SCALE, "log_scale": SCALE},
    "*Prompter": {"pad_*": PROMPT},
    "*.TvpModel": {"text_prompt": PROMPT},
    "models.*": {
        **NAMES,
        "*_embedding": POSITION,
        "*_embed": LeaveAlone("level embedding"),
        "*embeddings": POSITION,
        "*_embedding_parameter": TOKEN,
        "*positional_encoding": POSITION,
        "*positional_embedding*": POSITION,
        "position_enc": POSITION,
        "image_positions": POSITION,
        "rpb": RELATIVE,
        "emb_rel_[kv]": RELATIVE,
        "gru_rel_pos_const": RELATIVE,
        "no_object_pointer": TOKEN,
        "cls_emb": TOKEN,
        "segment_token_*": TOKEN,
        "type_token_*": TOKEN,
        "*_feature_extensor": TOKEN,
        "pooling_attention_query": QUERY,
        "latent_query": QUERY,
        "latents_[0-9]d": QUERY,
        "probe": QUERY,
        "query": QUERY,
        "bias_[uv]": BIAS,
        "*_bias_[uv]": BIAS,
        "b[12]": BIAS,
        "alpha_*": SCALE,
        "lambda*": SCALE,
        "scale": SCALE,
        "time_mix_*": MIXING,
        "relative_attention_bias": RELATIVE,
        "A_log": DYNAMICS,
        "D": DYNAMICS,
        "codevectors": CODEBOOK,
        "label_embeddings_concat": LOOKUP,
        "*temperature*": TEMPERATURE,
    },
}
