"""Parameter shapes of the benchmarked networks, with their weight vectors; no network is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from gradcentral.weight_vectors import WeightVectors

__all__ = ["MODELS", "ParameterShape", "resnet50"]


class ParameterShape(NamedTuple):
    """The shape of a parameter and its weight vectors, ``None`` if centering skips it."""

    shape: tuple[int, ...]
    vectors: WeightVectors | None


def _weight(*shape: int, unit_axis: int = 0) -> ParameterShape:
    """A weight with one output unit per index of ``unit_axis``."""
    span = tuple(axis for axis in range(len(shape)) if axis != unit_axis)
    return ParameterShape(shape, WeightVectors(span, shape=shape))


def _skipped(*shape: int) -> ParameterShape:
    return ParameterShape(shape, None)


def _norm(channels: int) -> list[ParameterShape]:
    return 2 * [_skipped(channels)]


def _conv_norm(*shape: int) -> list[ParameterShape]:
    return [_weight(*shape), *_norm(shape[0])]


def _linear(inputs: int, outputs: int, unit_axis: int = 0) -> list[ParameterShape]:
    shape = (inputs, outputs) if unit_axis else (outputs, inputs)
    return [_weight(*shape, unit_axis=unit_axis), _skipped(outputs)]


def _transformer(width: int, unit_axis: int = 0) -> Iterator[ParameterShape]:
    """Twelve blocks and the final norm."""
    for _ in range(12):
        yield from _norm(width)
        yield from _linear(width, 3 * width, unit_axis)
        yield from _linear(width, width, unit_axis)
        yield from _norm(width)
        yield from _linear(width, 4 * width, unit_axis)
        yield from _linear(4 * width, width, unit_axis)
    yield from _norm(width)


def resnet50() -> Iterator[ParameterShape]:
    """ResNet-50: 25.6 M parameters in 161 tensors (He et al. 2016)."""
    yield from _conv_norm(64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _conv_norm(width, channels, 1, 1)
            yield from _conv_norm(width, width, 3, 3)
            yield from _conv_norm(4 * width, width, 1, 1)
            if block == 0:
                yield from _conv_norm(4 * width, channels, 1, 1)
            channels = 4 * width
    yield from _linear(2048, 1000)


def _vit_s() -> Iterator[ParameterShape]:
    """ViT-S/16: 22 M parameters (Touvron et al. 2021)."""
    width = 384
    yield from (_skipped(1, 1, width), _skipped(1, 197, width), _weight(width, 3, 16, 16), _skipped(width))
    yield from _transformer(width)
    yield from _linear(width, 1000)


def _mobilenet_v2() -> Iterator[ParameterShape]:
    """MobileNetV2: 3.5 M parameters in many short rows; its depthwise filters have fan-in 9 (Sandler et al. 2018)."""
    yield from _conv_norm(32, 3, 3, 3)
    channels = 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, width, blocks in stages:
        for _ in range(blocks):
            hidden = channels * expansion
            if expansion != 1:
                yield from _conv_norm(hidden, channels, 1, 1)
            yield from _conv_norm(hidden, 1, 3, 3)
            yield from _conv_norm(width, hidden, 1, 1)
            channels = width
    yield from _conv_norm(1280, 320, 1, 1)
    yield from _linear(1280, 1000)


def _gpt2() -> Iterator[ParameterShape]:
    """GPT-2 small: 124 M parameters, with weights stored as [in, out], so that weight vectors are columns."""
    yield from (_skipped(50257, 768), _skipped(1024, 768))
    yield from _transformer(768, unit_axis=1)


def _dcgan() -> Iterator[ParameterShape]:
    """DCGAN's generator: 3.6 M parameters, transposed convolutions with strided units (Radford et al. 2016)."""
    for inputs, outputs in ((100, 512), (512, 256), (256, 128), (128, 64)):
        yield from (_weight(inputs, outputs, 4, 4, unit_axis=1), *_norm(outputs))
    yield _weight(64, 3, 4, 4, unit_axis=1)


def _tiny_cnn() -> Iterator[ParameterShape]:
    """Four layers with 26 k parameters, to measure the overhead per step."""
    for shape in ((16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 256)):
        yield from (_weight(*shape), _skipped(shape[0]))


MODELS: dict[str, Callable[[], Iterable[ParameterShape]]] = {
    "ResNet-50": resnet50,
    "ViT-S": _vit_s,
    "MobileNetV2": _mobilenet_v2,
    "GPT-2": _gpt2,
    "DCGAN": _dcgan,
    "tiny CNN": _tiny_cnn,
    "4096×11008": lambda: [_weight(4096, 11008)],  # one matrix of the MLP in a 7 B language model
}
