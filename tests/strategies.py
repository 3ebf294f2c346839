"""Random tensors with random weight vectors, for the property tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
