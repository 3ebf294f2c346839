"""timm: every parameter of small models of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradcentral import WeightVectors
from tests.zoo.checks import Architecture, Expected, check_classified, check_moves, library

timm: Any = library("timm")


def _of(name: str, special: dict[str, Expected], size: int = 32, **options: Any) -> Architecture:
    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=5, **options)
        return model

    return Architecture(name, make, lambda m: m(torch.randn(2, 3, size, size, dtype=torch.float64)), special)


_TOKEN: dict[str, Expected] = {"cls_token": "token"}
_POSITION: dict[str, Expected] = {"pos_embed": "position"}
_RELATIVE: dict[str, Expected] = {"*.relative_position_bias_table": "relative"}
_LEVIT: dict[str, Expected] = {"*.attention_biases": "relative"}
_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_WINDOWS: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


def _every_expert(module: Any) -> WeightVectors:
    taps_in = (module.in_channels // module.groups, *module.kernel_size)
    return WeightVectors((2, 3, 4), view=(module.num_experts, module.out_channels, *taps_in))


ARCHITECTURES = [
    _of("resnet10t", {}),
    _of("mobilenetv2_050", {}),
    _of("mobilenetv4_conv_small_035", {}),
    _of("efficientnet_cc_b0_4e", {"blocks.[456].?.conv_*.weight": _every_expert}),
    _of("nf_regnet_b0", {"*.gain": "gain"}),
    _of("convnext_atto", {}, **_CONVNEXT),
    _of("convnextv2_atto", {}, **_CONVNEXT),
    _of("vit_tiny_patch16_224", {**_TOKEN, **_POSITION}, **_TINY),
    _of("vit_base_patch16_siglip_224", {"attn_pool.latent": "latent", **_POSITION}, **_TINY),
    _of("deit_tiny_distilled_patch16_224", {"dist_token": "token", **_TOKEN, **_POSITION}, **_TINY),
    _of("beit_base_patch16_224", {**_TOKEN, **_RELATIVE}, **_TINY),
    _of("eva02_tiny_patch14_224", {**_TOKEN, **_POSITION}, **_TINY),
    _of("samvit_base_patch16", {"*.rel_pos_?": "relative", **_POSITION}, **_TINY),
    _of("swin_tiny_patch4_window7_224", _RELATIVE, **_WINDOWS),
    _of("swinv2_tiny_window8_256", {"*.logit_scale": "temperature"}, **_WINDOWS),
    _of("cait_xxs24_224", {**_TOKEN, **_POSITION}, **_TINY),
    _of("xcit_nano_12_p16_224", {"*.temperature": "temperature", **_TOKEN}, **_TINY),
    _of("levit_128s", _LEVIT, size=224),
    _of("mixer_s32_224", {}, size=224),
    _of("resmlp_12_224", {"*.alpha": "scale", "*.beta": "scale"}, size=224),
    _of("efficientvit_m0", _LEVIT, size=64, img_size=64),
    _of("swiftformer_xs", {"*.w_g": (0,), "*.layer_scale*.gamma": "scale"}, size=64),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_parameter_is_classified(architecture: Architecture) -> None:
    check_classified(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_nothing_is_frozen(architecture: Architecture) -> None:
    check_moves(architecture)
