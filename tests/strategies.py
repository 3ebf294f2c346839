"""Random tensors with random weight vectors, and patterns with their meaning, for the property tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from gradcentral import WeightVectors

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)


class Case(NamedTuple):
    """A tensor and weight vectors that fit its shape."""

    tensor: Tensor
    vectors: WeightVectors


@st.composite
def shapes_and_vectors(draw: st.DrawFn) -> tuple[tuple[int, ...], WeightVectors]:
    """Draw a shape of 1 to 4 axes, a view that may split some of them, and a non-empty span of the view's axes."""
    shape: list[int] = []
    view: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()) and len(view) < 5:
            outer, inner = draw(st.integers(1, 3)), draw(st.integers(1, 4))
            shape.append(outer * inner)
            view += [outer, inner]
        else:
            size = draw(st.integers(1, 6))
            shape.append(size)
            view.append(size)
    split = len(view) != len(shape)
    span = draw(st.sets(st.integers(0, len(view) - 1), min_size=1))
    return tuple(shape), WeightVectors(tuple(span), tuple(view) if split else None)


class Written(NamedTuple):
    """A pattern and what it means, generated together."""

    pattern: str
    shape: tuple[int, ...]
    span: tuple[int, ...]
    view: tuple[int, ...]
    sizes: dict[str, int]

    @property
    def vectors(self) -> WeightVectors:
        return WeightVectors(self.span, None if len(self.view) == len(self.shape) else self.view, self.shape)


@st.composite
def written_patterns(draw: st.DrawFn) -> Written:
    """Draw a pattern with names, numbers, split axes, an ellipsis and brackets around any run of factors or axes."""
    texts: list[str] = []
    shape: list[int] = []
    span: list[int] = []
    view: list[int] = []
    sizes: dict[str, int] = {}
    names = iter("abcdefghijkl")
    repeated = draw(st.integers(0, 5))  # the position of the axis with an ellipsis, if there are so many
    for position in range(draw(st.integers(1, 4))):
        factors = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
        whole = draw(st.booleans())  # whether the brackets are around all factors or around each
        spanned = [draw(st.booleans())] * len(factors) if whole else [draw(st.booleans()) for _ in factors]
        span += [len(view) + offset for offset, inside in enumerate(spanned) if inside]
        view += factors
        if position == repeated:  # the factors are axes of their own
            texts.append(f"[{next(names)}...]" if spanned[0] else f"{next(names)}...")
            span = [axis for axis in span if axis < len(view) - len(factors)]
            span += [len(view) - len(factors) + offset for offset in range(len(factors)) if spanned[0]]
            shape += factors
            continue
        shape.append(math.prod(factors))
        named = draw(st.integers(0, len(factors) - 1))  # the factor whose size follows from the others
        pieces = []
        for offset, size in enumerate(factors):
            if offset == named or draw(st.booleans()):
                pieces.append(name := next(names))
                if offset != named or draw(st.booleans()):
                    sizes[name] = size
            else:
                pieces.append(str(size))
        if not whole:
            pieces = [f"[{piece}]" if inside else piece for piece, inside in zip(pieces, spanned, strict=True)]
        text = f"({' '.join(pieces)})" if len(pieces) > 1 else pieces[0]
        texts.append(f"[{text}]" if whole and spanned[0] else text)
    assume(span)
    return Written(" ".join(texts), tuple(shape), tuple(span), tuple(view), sizes)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATING, expanded: bool = True) -> Case:
    """Draw a tensor that is contiguous, permuted (transposed, channels_last), sliced, or expanded."""
    shape, vectors = draw(shapes_and_vectors())
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    strides = draw(st.sampled_from(["contiguous", "permuted", "sliced", *(["expanded"] if expanded else [])]))
    if strides == "permuted":
        order = draw(st.permutations(range(len(shape))))
        tensor = randn(*(shape[axis] for axis in order)).permute(*(order.index(axis) for axis in range(len(shape))))
    elif strides == "sliced":
        tensor = randn(*(size + 2 for size in shape))[tuple(slice(1, size + 1) for size in shape)]
    elif strides == "expanded":
        axis = draw(st.integers(0, len(shape) - 1))
        tensor = randn(*(1 if a == axis else size for a, size in enumerate(shape))).expand(shape)
    else:
        tensor = randn(*shape)
    assert tensor.shape == shape
    assert math.prod(vectors.for_shape(shape).dims) == tensor.numel()
    return Case(tensor, vectors)
