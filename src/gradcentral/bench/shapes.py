"""Parameter shapes of the benchmarked networks, with their weight vectors; no network is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from gradcentral.weight_vectors import WeightVectors

__all__ = ["MODELS", "ParameterShape"]


class ParameterShape(NamedTuple):
    shape: tuple[int, ...]
    vectors: WeightVectors | None  # None if centering skips the parameter


def _skipped(*shapes: tuple[int, ...]) -> list[ParameterShape]:
    return [ParameterShape(shape, None) for shape in shapes]


def _layers(*shapes: tuple[int, ...], pattern: str = "o [i...]", per_unit: int = 1) -> Iterator[ParameterShape]:
    """Yield weights, each followed by ``per_unit`` skipped parameters with one element per output channel."""
    for shape in shapes:
        yield ParameterShape(shape, WeightVectors.parse(pattern, shape))
        yield from _skipped(*per_unit * [(shape[pattern.split().index("o")],)])


_conv_norms = partial(_layers, per_unit=2)


def _transformer(width: int) -> Iterator[ParameterShape]:
    """Yield twelve blocks and the final norm."""
    norm = _skipped((width,), (width,))
    for _ in range(12):
        yield from norm
        yield from _layers((3 * width, width), (width, width))
        yield from norm
        yield from _layers((4 * width, width), (width, 4 * width))
    yield from norm


def _resnet50() -> Iterator[ParameterShape]:
    """Yield ResNet-50: 25.6 M parameters in 161 tensors (He et al. 2016)."""
    yield from _conv_norms((64, 3, 7, 7))
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _conv_norms((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            if block == 0:
                yield from _conv_norms((4 * width, channels, 1, 1))
            channels = 4 * width
    yield from _layers((1000, 2048))


def _vit_s() -> Iterator[ParameterShape]:
    """Yield ViT-S/16: 22 M parameters (Touvron et al. 2021)."""
    yield from _skipped((1, 1, 384), (1, 197, 384))
    yield from _layers((384, 3, 16, 16))
    yield from _transformer(384)
    yield from _layers((1000, 384))


def _mobilenet_v2() -> Iterator[ParameterShape]:
    """Yield MobileNetV2: 3.5 M parameters, many short rows, depthwise filters of fan-in 9 (Sandler et al. 2018)."""
    yield from _conv_norms((32, 3, 3, 3))
    channels = 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, width, blocks in stages:
        for _ in range(blocks):
            hidden = channels * expansion
            if expansion != 1:
                yield from _conv_norms((hidden, channels, 1, 1))
            yield from _conv_norms((hidden, 1, 3, 3), (width, hidden, 1, 1))
            channels = width
    yield from _conv_norms((1280, 320, 1, 1))
    yield from _layers((1000, 1280))


def _gpt2() -> Iterator[ParameterShape]:
    """Yield GPT-2 small: 124 M parameters, with weights stored as [in, out], so that weight vectors are columns."""
    yield from _skipped((50257, 768), (1024, 768))
    for parameter in _transformer(768):
        columns = WeightVectors((0,), shape=parameter.shape[::-1]) if parameter.vectors else None
        yield ParameterShape(parameter.shape[::-1], columns)


def _dcgan() -> Iterator[ParameterShape]:
    """Yield DCGAN's generator: 3.6 M parameters, transposed convolutions (Radford et al. 2016).

    The first has stride 1, the others kernel 4 and stride 2, and hence four weight vectors per output channel.
    """
    up = "[i] o ([m] 2) ([m] 2)"
    yield from _conv_norms((100, 512, 4, 4), pattern="[i] o [k k]")
    yield from _conv_norms((512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), pattern=up)
    yield from _layers((64, 3, 4, 4), pattern=up, per_unit=0)


MODELS: dict[str, Callable[[], Iterable[ParameterShape]]] = {
    "ResNet-50": _resnet50,
    "ViT-S": _vit_s,
    "MobileNetV2": _mobilenet_v2,
    "GPT-2": _gpt2,
    "DCGAN": _dcgan,
    # 26 k parameters, to measure the overhead per step.
    "tiny CNN": lambda: _layers((16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 256)),
    "4096×11008": lambda: _layers((4096, 11008), per_unit=0),  # one matrix of the MLP in a 7 B language model
}
