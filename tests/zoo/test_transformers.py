"""Hugging Face transformers: every parameter of small models of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradcentral
from tests.zoo.checks import Architecture, check_classified, check_moves, library

transformers: Any = library("transformers")

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 3}


def _text(model: nn.Module, **more: Any) -> Any:
    return model(input_ids=torch.randint(3, 50, (2, 9)), **more)


def _translation(model: nn.Module) -> Any:
    return model(input_ids=torch.randint(3, 50, (2, 9)), decoder_input_ids=torch.randint(3, 50, (2, 7)))


def _image(model: nn.Module, size: int = 16) -> Any:
    return model(pixel_values=torch.randn(2, 3, size, size, dtype=torch.float64))


def _of(name: str, forward: Any, special: Any, **config: Any) -> Architecture:
    def make() -> nn.Module:
        cls = getattr(transformers, name)
        model: nn.Module = cls(cls.config_class(**config))
        return model

    return Architecture(name, make, forward, special)


_EXPERTS = {"*.experts.gate_up_proj": (2,), "*.experts.down_proj": (2,)}
_TRANSPOSED = {"*.experts.gate_up_proj": (1,), "*.experts.down_proj": (1,)}
_CONV1D = {"*.c_attn.weight": (0,), "*.c_proj.weight": (0,), "*.c_fc.weight": (0,)}
_RELATIVE = {"*.relative_position_bias_table": "relative"}
_VIT = {"*.cls_token": "token", "*.position_embeddings": "position"}

_MOE = {**_SMALL, "experts_implementation": "eager", "moe_intermediate_size": 12}
_TIED = {**_SMALL, "tie_word_embeddings": True}
_VISION = {**_SMALL, **_IMAGES}

ARCHITECTURES = [
    # Text
    _of("GPT2LMHeadModel", _text, {**_CONV1D, "*.wte.weight": "tied"}, n_embd=16, n_layer=2, n_head=4, vocab_size=50),
    _of(
        "OpenAIGPTLMHeadModel",
        _text,
        {**_CONV1D, "*.tokens_embed.weight": "tied"},
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=50,
    ),
    _of("ImageGPTModel", _text, _CONV1D, n_embd=16, n_layer=2, n_head=4, vocab_size=50),
    _of("BertForMaskedLM", _text, {"*.word_embeddings.weight": "tied"}, **_TIED),
    _of("DistilBertModel", _text, {}, vocab_size=50, dim=16, n_layers=2, n_heads=4, hidden_dim=24),
    _of("DebertaV2Model", _text, {}, **_SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _of(
        "ConvBertModel",
        _text,
        {"*.intermediate.dense.weight": (1,), "*.output.dense.weight": (1,), "*.key_conv_attn_layer.bias": "bias"},
        **_SMALL,
        num_groups=2,
        embedding_size=16,
    ),
    _of(
        "FunnelModel",
        _text,
        {"*.r_kernel": (0,), "*.r_[wrs]_bias": "bias", "*.seg_embed": "segment"},
        vocab_size=50,
        d_model=16,
        n_head=4,
        d_head=4,
        d_inner=24,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    _of(
        "XLNetLMHeadModel",
        _text,
        {
            "*.mask_emb": "token",
            "*.word_embedding.weight": "tied",
            "*.rel_attn.[qkvr]": (0,),
            "*.rel_attn.o": (1, 2),
            "*.r_[wrs]_bias": "bias",
            "*.seg_embed": "segment",
        },
        vocab_size=50,
        d_model=16,
        n_layer=2,
        n_head=4,
        d_inner=24,
    ),
    _of(
        "T5ForConditionalGeneration",
        _translation,
        {"shared.weight": "tied"},
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    _of("LlamaForCausalLM", _text, {}, **_SMALL),
    _of("Gemma3ForCausalLM", _text, {"*.embed_tokens.weight": "tied"}, **_TIED),
    _of(
        "RecurrentGemmaForCausalLM",
        _text,
        {"*_gate_weight": (1,), "*_gate_bias": "bias"},
        **{**_SMALL, "num_hidden_layers": 3},
        lru_width=16,
    ),
    # State space models
    _of(
        "MambaForCausalLM",
        _text,
        {"*.embeddings.weight": "tied", "*.A_log": "dynamics"},
        vocab_size=50,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=2,
    ),
    _of(
        "Mamba2ForCausalLM",
        _text,
        {},
        vocab_size=50,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        n_groups=1,
    ),
    _of(
        "RwkvModel",
        _text,
        {"*.time_mix_*": "mixing"},
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        context_length=32,
    ),
    _of(
        "ZambaForCausalLM",
        _text,
        {
            "*.x_proj_weight": (2,),
            "*.dt_proj_weight": (2,),
            "*.dt_proj_bias": "bias",
            "*.A_log": "dynamics",
            "*.D": "dynamics",
        },
        **{**_SMALL, "num_hidden_layers": 3, "num_key_value_heads": 4},
        mamba_d_state=4,
        mamba_dt_rank=2,
        n_mamba_heads=2,
        attention_head_dim=8,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    # Experts
    _of("MixtralForCausalLM", _text, {**_EXPERTS, "*.gate.weight": (1,)}, num_local_experts=4, **_MOE),
    _of(
        "Qwen2MoeForCausalLM",
        _text,
        {**_EXPERTS, "*.mlp.gate.weight": (1,)},
        num_experts=4,
        shared_expert_intermediate_size=12,
        **_MOE,
    ),
    _of(
        "DeepseekV3ForCausalLM",
        _text,
        {**_EXPERTS, "*.mlp.gate.weight": (1,)},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        **{**_MOE, "head_dim": 4, "num_key_value_heads": 4},
    ),
    _of(
        "GptOssForCausalLM",
        _text,
        {**_TRANSPOSED, "*.router.weight": (1,), "*_proj_bias": "bias"},
        num_local_experts=4,
        **_MOE,
    ),
    _of("Llama4ForCausalLM", _text, _TRANSPOSED, num_local_experts=2, intermediate_size_mlp=24, **_MOE),
    _of(
        "JetMoeForCausalLM",
        _text,
        {"*put_linear.weight": (2,)},
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=4,
        **_MOE,
    ),
    _of(
        "NemotronHForCausalLM",
        _text,
        {"*.experts.up_proj": (2,), "*.experts.down_proj": (2,), "*.gate.weight": (1,)},
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=2,
        chunk_size=8,
        **_MOE,
    ),
    # Images
    _of("ViTForImageClassification", _image, _VIT, **_VISION),
    _of(
        "BeitModel",
        _image,
        {"*.cls_token": "token", "*.mask_token": "token", **_RELATIVE},
        **_VISION,
        use_relative_position_bias=True,
        use_mask_token=True,
    ),
    _of(
        "ConvNextForImageClassification", lambda m: _image(m, 32), {}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
    ),
    _of(
        "ConvNextV2Model",
        lambda m: _image(m, 32),
        {"*.grn.weight": "normalization", "*.grn.bias": "bias"},
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
    ),
    _of(
        "SwinModel",
        lambda m: _image(m, 32),
        _RELATIVE,
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    _of(
        "Swinv2Model",
        lambda m: _image(m, 32),
        {"*.logit_scale": "temperature"},
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    _of(
        "SegformerForSemanticSegmentation",
        lambda m: _image(m, 64),
        {},
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    _of(
        "LevitModel",
        lambda m: _image(m, 64),
        {"*.attention_biases": "relative"},
        image_size=64,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        drop_path_rate=0,
    ),
    _of(
        "CLIPModel",
        lambda m: m(
            input_ids=torch.randint(3, 49, (2, 9)), pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64)
        ),
        {},
        text_config=_SMALL,
        vision_config=_VISION,
        projection_dim=12,
    ),
    _of(
        "SamVisionModel",
        lambda m: _image(m, 32),
        {"*.pos_embed": "position", "*.rel_pos_?": "relative"},
        **{
            **_VISION,
            "image_size": 32,
            "output_channels": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "use_rel_pos": True,
            "mlp_dim": 24,
        },
    ),
    _of(
        "VitDetModel",
        _image,
        {"*.position_embeddings": "position", "*.rel_pos_?": "relative"},
        **_VISION,
        use_relative_position_embeddings=True,
        window_size=2,
        window_block_indices=[0],
    ),
    # Audio
    _of(
        "Wav2Vec2ForPreTraining",
        lambda m: m(
            torch.randn(2, 600, dtype=torch.float64),
            mask_time_indices=(torch.arange(59) % 3 == 0)[None, :].expand(2, -1)[
                :, : m._get_feat_extract_output_lengths(600)
            ],
        ),
        {"*.original0": "magnitude", "*.original1": (1, 2), "*.codevectors": "codebook"},
        **_SMALL,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        codevector_dim=8,
        proj_codevector_dim=8,
        num_codevectors_per_group=4,
    ),
    _of(
        "WhisperModel",
        lambda m: m(
            input_features=torch.randn(2, 8, 16, dtype=torch.float64), decoder_input_ids=torch.randint(3, 50, (2, 5))
        ),
        {},
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        decoder_start_token_id=1,
        eos_token_id=2,
        bos_token_id=1,
    ),
    _of(
        "PerceiverModel",
        lambda m: m(inputs=torch.randn(2, 7, 12, dtype=torch.float64)),
        {"*.latents": "latent"},
        num_latents=4,
        d_latents=16,
        d_model=12,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_parameter_is_classified(architecture: Architecture) -> None:
    check_classified(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_nothing_is_frozen(architecture: Architecture) -> None:
    check_moves(architecture)


def test_the_trainer_creates_the_optimizer_from_its_class(tmp_path: Path) -> None:
    """Trainer passes the groups of its weight decay, and no model."""
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(gradcentral.AdamW, {"lr": 1e-3}))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, gradcentral.AdamW)
    assert dict(optimizer.layout) == dict(gradcentral.weight_layout(model))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
