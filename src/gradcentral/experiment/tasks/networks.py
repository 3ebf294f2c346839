"""The networks that several built-in tasks share: a residual network, a transformer block and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NORMS", "LoRA", "PatchTransformer", "ResNet", "TransformerBlock", "add_lora", "dead_units"]

Norm = Callable[[int], nn.Module]
"""Channels -> normalization layer."""

NORMS: dict[str, Norm] = {
    "none": lambda channels: nn.Identity(),
    "batchnorm": nn.BatchNorm2d,
    "groupnorm": lambda channels: nn.GroupNorm(4, channels),
    "layernorm": lambda channels: nn.GroupNorm(1, channels),  # over all channels and pixels of an image
}


class ResNet(nn.Module):
    """A residual network for small images, ``[n, channels, height, width]`` to ``[n, classes]`` (He et al. 2016).

    Each width is a stage of ``blocks`` blocks, and each stage after the first halves the size of the image. The
    default has 20,000 parameters; ResNet-18 has the widths 64, 128, 256 and 512, and two blocks per stage.
    """

    def __init__(
        self, norm: str, classes: int = 10, channels: int = 1, widths: Sequence[int] = (8, 16, 32), blocks: int = 1
    ) -> None:
        super().__init__()
        make = NORMS[norm]
        layers = [*_conv(channels, widths[0], 1, make), nn.ReLU()]
        before = widths[0]
        for width in widths:
            for _ in range(blocks):
                layers.append(_Block(before, width, 1 if width == before else 2, make))
                before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


def _conv(inputs: int, outputs: int, stride: int, norm: Norm, kernel: int = 3) -> list[nn.Module]:
    normed = norm(outputs)
    bias = isinstance(normed, nn.Identity)  # a normalization has its own
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias), normed]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        first, second = _conv(inputs, outputs, stride, norm), _conv(outputs, outputs, 1, norm)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, stride, norm, kernel=1))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


class TransformerBlock(nn.Module):
    """Attention and a GELU network, each after a norm (pre-norm): ``[n, length, width]`` to the same shape."""

    def __init__(self, width: int, heads: int, norm: Norm, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PatchTransformer(nn.Module):
    """A vision transformer with 4×4 patches and LayerNorm: ``[n, 1, 16, 16]`` to ``[n, classes]``."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Linear(16, width)
        self.position = nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, nn.LayerNorm, causal=False) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(functional.unfold(images, 4, stride=4).mT) + self.position.weight
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # training starts from the pretrained network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and give each linear layer a `LoRA`; return the model."""
    model.requires_grad_(False)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child, rank))
    return model


def dead_units(model: nn.Module, inputs: Tensor) -> float | None:
    """Return the fraction of the units after `nn.ReLU` that are 0 for all inputs; a channel is one unit.

    None if the model has no `nn.ReLU`.
    """
    active: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, _: object, output: Tensor) -> None:
        channels = (output > 0).transpose(0, 1).flatten(1).any(1)
        active[module] = active[module] | channels if module in active else channels

    hooks = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, nn.ReLU)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return 1 - float(torch.cat([*active.values()]).float().mean()) if active else None
