"""Hugging Face transformers, as of version 5.23."""

from functools import partial

from torch import Tensor, nn

import gradcentral.layout.reasons as skip
from gradcentral.layout.reasons import each
from gradcentral.layout.rules import LeaveAlone, LibraryTable, Rules, axes, unexpected_shape

_HIDDEN_SIZES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_dim")


def experts(transposed: bool | None = None) -> Rules:
    """Return rules for experts stored as ``"e o [i]"``, or as ``"e [i] o"`` if transposed, under the same names.

    The module's own ``is_transposed`` takes precedence over the argument. The size of the hidden layer, an output of
    the first projections and an input of the last one, must not contradict them, and determines the order if both are
    missing.
    """
    first = partial(_pattern, transposed, "o")
    return {
        "gate_up_proj": partial(first, 2),
        "gate_proj": partial(first, 1),
        "up_proj": partial(first, 1),
        "down_proj": partial(_pattern, transposed, "i", 1),
    }


def _pattern(
    transposed: bool | None, hidden_axis: str, multiple: int, module: nn.Module, tensor: Tensor
) -> str | LeaveAlone:
    if tensor.ndim != 3:
        return unexpected_shape(module, tensor, "three axes")
    if isinstance(flag := getattr(module, "is_transposed", None), bool):
        transposed = flag
    orders = [order for order, turned in (("eoi", False), ("eio", True)) if transposed in (None, turned)]
    sizes = [size for name in _HIDDEN_SIZES if isinstance(size := getattr(module, name, None), int)]
    if sizes:
        hidden = multiple * sizes[0]
        orders = [order for order in orders if tensor.shape[order.index(hidden_axis)] == hidden]
        if not orders:
            return unexpected_shape(module, tensor, f"a hidden layer of {hidden} units")
    if len(orders) > 1:
        return LeaveAlone(f"{type(module).__name__} may be stored as 'e o [i]' or as 'e [i] o'", unknown=True)
    return " ".join(orders[0]).replace("i", "[i]")


TABLE: LibraryTable = {
    "*.Conv1D": {"weight": axes("[i] o", i="nx", o="nf"), "bias": skip.BIAS},
    # All other experts have an attribute is_transposed, or sizes that determine the order.
    **each(experts(True), "*.GptOssExperts *.OpenAIPrivacyFilterExperts *.AriaExperts *.Llama4TextExperts"),
    **each(experts(False), "*.MixtralExperts *.LongcatFlashExperts *.Step3p7Experts *.InklingSharedExperts"),
    "*Experts": experts(),
    "*ParallelExperts": {"weight": axes("e o [i]", e="num_experts", o="output_size", i="input_size")},
    # [experts · inner, hidden]; w2 is used as x @ w on the rows of each expert.
    "*.DbrxExpertGLU": {"[wv]1": axes("o [i]", i="hidden_size"), "w2": axes("(e [i]) o", i="ffn_hidden_size")},
    "*.InklingTopkRouter": {"weight": axes("o [i]", o="n_total_experts", i="hidden_dim")},
    "models.*Router": {"weight": axes("o [i]", o="num_experts", i="hidden_dim")},
    # One linear map per group, layer or codebook.
    "*.GroupedLinearLayer": {"weight": axes("g [i] o", g="num_groups", i="group_in_dim", o="group_out_dim")},
    **each({"*weight": axes("g [i] o")}, "*.CsmCodebooksHead *.EsmFold2ConfidenceHead"),
    "*FlexibleLinear": {"weight": axes("g o [i]")},
    "*.RecurrentGemmaRglru": {"*_gate_weight": axes("g [i] o", g="num_attention_heads", i="block_width")},
    # Raw projections.
    "*.XLNetRelativeAttention": {"[qkvr]": axes("[i] h o", i="d_model"), "o": axes("o [h i]", o="d_model")},
    "*.FunnelRelMultiheadAttention": {"r_kernel": axes("[i] h o")},
    "*MultiModalProjector": {"mm_input_projection_weight": axes("[i] o")},
    "*.OmDetTurboLanguageBackbone": {"text_projection": axes("[i] o")},
    "*.XCLIPModel": {"prompts_visual_projection": axes("[i] o")},
    "*.SwiftFormerEfficientAdditiveAttention": {"w_g": axes("[i] o")},
    "*.AMSoftmaxLoss": {"weight": axes("[i] o", o="num_labels")},
    "*.EsmFold2Parcae": {"input_matrix_continuous": axes("o [i]")},
    "*.Glm5NextTextIndexer": {"index_kpool_compress_gate": axes("o [i]", o="head_dim"), "*_ape": skip.POSITION},
    "*.QuantLinear": {"weight": axes("o [i]", o="out_features", i="in_features")},
    **each({"fn": axes("o [i]"), "hc_fn": axes("o [i]")}, "*HyperConnection *HyperHead"),
    "*.Inkling2DynamicShortConvolution": {"static_weight": axes("[i] o")},
    # State-space layers.
    "*.ZambaMambaMixer": {
        "x_proj_weight": axes("g o [i]", g="n_mamba_heads", i="mamba_head_dim"),
        "dt_proj_weight": axes("g o [i]", g="n_mamba_heads", o="mamba_head_dim"),
    },
    # Not the weights of units.
    "*.BrosRelationExtractor": {"dummy_node": skip.TOKEN},
    "*.GitModel": {"img_temporal_embedding.*": skip.POSITION},
    "*.AxialPositionEmbeddings": {"weights.*": skip.POSITION},
    "*.SinusoidalPositionalEmbedding": {"weight": skip.POSITION},
    "*.QuantEmbedding": {"weight": skip.LOOKUP},
    "*RelativeLogits": {"proj": skip.RELATIVE},
    **each({"weight": skip.NORM_GAIN}, "*GRN *NormalizationLayer"),
    "*.PerceiverMultimodal*": {"padding.*": skip.TOKEN, "mask.*": skip.TOKEN},
    "*.MllamaPrecomputedPositionEmbedding": {"embedding": skip.POSITION},
    "*.XIELUActivation": {"alpha_[pn]": skip.ACTIVATION},
    "*.BayesianDetectorWatermarkedLikelihood": {"*": LeaveAlone("parameter of a watermark detector")},
    "integrations.*": {"*": LeaveAlone("storage of a quantized layer")},
    "*Snake*": {"alpha": skip.ACTIVATION, "beta": skip.ACTIVATION},
    "*.VitsElementwiseAffine": {"translate": skip.SCALE, "log_scale": skip.SCALE},
    "*Prompter": {"pad_*": skip.PROMPT},
    "*.TvpModel": {"text_prompt": skip.PROMPT},
    "models.*": {
        **skip.NAMES,
        "seg_embed": LeaveAlone("segment embedding"),
        "*_embed": LeaveAlone("level embedding"),
        **each(skip.POSITION, "*_embedding *embeddings position_enc *positional_encoding image_positions"),
        **each(skip.TOKEN, "*_embedding_parameter no_object_pointer cls_emb *_feature_extensor"),
        **each(skip.TOKEN, "segment_token_* type_token_*"),
        **each(skip.RELATIVE, "rpb emb_rel_[kv] gru_rel_pos_const"),
        **each(skip.QUERY, "pooling_attention_query latent_query latents_[0-9]d probe query"),
        **each(skip.BIAS, "bias_[uv] *_bias_[uv] b[12]"),
        **each(skip.SCALE, "alpha_* lambda* scale"),
        **each(skip.DYNAMICS, "A_log D"),
        "time_mix_*": skip.MIXING,
        "codevectors": skip.CODEBOOK,
        "label_embeddings_concat": skip.LOOKUP,
        "*temperature*": skip.TEMPERATURE,
    },
}
