"""Parameter shapes of the networks that are measured, with the weight vectors of each: no network is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gradcentral.weight_vectors import WeightVectors

__all__ = ["MODELS", "Shape"]

Shape = tuple[tuple[int, ...], WeightVectors | None]
"""A parameter's shape and its weight vectors; None where it is left alone."""


def _rows(*shape: int) -> Shape:
    return shape, WeightVectors(tuple(range(1, len(shape))), shape=shape)


def _columns(*shape: int) -> Shape:
    return shape, WeightVectors((0,), shape=shape)


def _transposed(*shape: int) -> Shape:
    return shape, WeightVectors((0, *range(2, len(shape))), shape=shape)


def _alone(*shape: int) -> Shape:
    return shape, None


def _norm(channels: int) -> list[Shape]:
    return [_alone(channels), _alone(channels)]


def resnet50() -> Iterator[Shape]:
    """ResNet-50, 25.6 M parameters in 161 tensors (He et al. 2016)."""
    yield _rows(64, 3, 7, 7)
    yield from _norm(64)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                yield _rows(*shape)
                yield from _norm(shape[0])
            if block == 0:
                yield _rows(4 * width, channels, 1, 1)
                yield from _norm(4 * width)
            channels = 4 * width
    yield from (_rows(1000, 2048), _alone(1000))


def vit_s() -> Iterator[Shape]:
    """ViT-S/16, 22 M parameters (Touvron et al. 2021)."""
    width = 384
    yield from (_alone(1, 1, width), _alone(1, 197, width), _rows(width, 3, 16, 16), _alone(width))
    for _ in range(12):
        yield from _norm(width)
        yield from (_rows(3 * width, width), _alone(3 * width), _rows(width, width), _alone(width))
        yield from _norm(width)
        yield from (_rows(4 * width, width), _alone(4 * width), _rows(width, 4 * width), _alone(width))
    yield from _norm(width)
    yield from (_rows(1000, width), _alone(1000))


def mobilenet_v2() -> Iterator[Shape]:
    """MobileNetV2, 3.5 M parameters: many short rows, depthwise filters of 9 (Sandler et al. 2018)."""
    yield _rows(32, 3, 3, 3)
    yield from _norm(32)
    channels = 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expand, width, blocks in stages:
        for _ in range(blocks):
            hidden = channels * expand
            if expand != 1:
                yield _rows(hidden, channels, 1, 1)
                yield from _norm(hidden)
            yield _rows(hidden, 1, 3, 3)
            yield from _norm(hidden)
            yield _rows(width, hidden, 1, 1)
            yield from _norm(width)
            channels = width
    yield _rows(1280, 320, 1, 1)
    yield from _norm(1280)
    yield from (_rows(1000, 1280), _alone(1000))


def gpt2() -> Iterator[Shape]:
    """GPT-2 small, 124 M parameters: weights stored [in, out], so that weight vectors are columns."""
    width = 768
    yield from (_alone(50257, width), _alone(1024, width))
    for _ in range(12):
        yield from _norm(width)
        yield from (_columns(width, 3 * width), _alone(3 * width), _columns(width, width), _alone(width))
        yield from _norm(width)
        yield from (_columns(width, 4 * width), _alone(4 * width), _columns(4 * width, width), _alone(width))
    yield from _norm(width)


def dcgan() -> Iterator[Shape]:
    """DCGAN's generator, 3.6 M parameters: transposed convolutions, whose units are strided (Radford et al. 2016)."""
    for shape in ((100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)):
        yield _transposed(*shape)
        if shape[1] > 3:
            yield from _norm(shape[1])


def tiny_cnn() -> Iterator[Shape]:
    """Four layers, 26 k parameters: what is measured is the overhead."""
    yield from (_rows(16, 1, 3, 3), _alone(16), _rows(32, 16, 3, 3), _alone(32))
    yield from (_rows(64, 32, 3, 3), _alone(64), _rows(10, 256), _alone(10))


def matrix() -> Iterator[Shape]:
    """One matrix of a 7 B language model's MLP, 45 M parameters."""
    yield _rows(4096, 11008)


MODELS: dict[str, Callable[[], Iterator[Shape]]] = {
    "ResNet-50": resnet50,
    "ViT-S": vit_s,
    "MobileNetV2": mobilenet_v2,
    "GPT-2": gpt2,
    "DCGAN": dcgan,
    "tiny CNN": tiny_cnn,
    "4096×11008": matrix,
}
