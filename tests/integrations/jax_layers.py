"""Layers of Flax, Equinox and Haiku that are linear in their input, as functions of (parameters, input)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("flax", reason="needs flax: run `make jax`")
pytest.importorskip("equinox", reason="needs equinox: run `make jax`")
pytest.importorskip("haiku", reason="needs haiku: run `make jax`")

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from gradcentral.integrations.named_layout import NamedLayout
from gradcentral.integrations.optax import weight_layout

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Layer:
    """A layer without a bias, and whether the mean over axes 1 and up, which is optax.centralize, is right for it."""

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    inputs: tuple[int, ...]
    layout: NamedLayout
    right_by_shape: bool = False


def of_linen(module: linen.Module, inputs: tuple[int, ...], *, right_by_shape: bool = False) -> Layer:
    x = jnp.ones(inputs)
    params = module.init(KEY, x)["params"]
    layout = weight_layout(lambda: module.init(KEY, x))
    return Layer(params, lambda params, x: module.apply({"params": params}, x), inputs, layout, right_by_shape)


def of_nnx(module: nnx.Module, inputs: tuple[int, ...], *, right_by_shape: bool = False) -> Layer:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    run = lambda params, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    return Layer(params, run, inputs, weight_layout(module), right_by_shape)


def of_equinox(module: eqx.Module, inputs: tuple[int, ...], *, right_by_shape: bool = False) -> Layer:
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    run = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)  # noqa: E731
    return Layer(params, run, inputs, weight_layout(module), right_by_shape)


def of_haiku(build: Callable[[], Any], inputs: tuple[int, ...], *, right_by_shape: bool = False) -> Layer:
    model = hk.without_apply_rng(hk.transform(lambda x: build()(x)))
    x = jnp.ones(inputs)
    layout = weight_layout(lambda: model.init(KEY, x))
    return Layer(model.init(KEY, x), model.apply, inputs, layout, right_by_shape)


def repeated(linear: Any) -> Any:
    """Return linen layers, each with weights of its own, that all receive the same input."""
    return linen.vmap(linear, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)


_OFF: dict[str, Any] = {"use_bias": False}
_RNGS = nnx.Rngs(0)
_EINSUM = "abc,cde->abe"

# Sizes differ, so that no axis can be mistaken for another one; a second case has equal sizes.
LAYERS: dict[str, Callable[[], Layer]] = {
    # Dense layers: [in, out].
    "linen.Dense": lambda: of_linen(linen.Dense(4, **_OFF), (9, 5)),
    "linen.DenseGeneral to heads": lambda: of_linen(linen.DenseGeneral((2, 3), **_OFF), (9, 5)),
    "linen.DenseGeneral from heads": lambda: of_linen(linen.DenseGeneral(4, axis=(-2, -1), **_OFF), (9, 2, 3)),
    "linen.DenseGeneral batched": lambda: of_linen(linen.DenseGeneral(4, batch_dims=(0,), **_OFF), (3, 9, 5)),
    "linen.Einsum": lambda: of_linen(linen.Einsum((5, 2, 4), "abc,cde->abde", **_OFF), (9, 3, 5)),
    "linen.Einsum sums two axes": lambda: of_linen(linen.Einsum((3, 5, 4), "abc,bce->ae", **_OFF), (9, 3, 5)),
    "linen.Dense repeated": lambda: of_linen(repeated(linen.Dense)(4, **_OFF), (9, 5)),
    "linen.Dense repeated, equal sizes": lambda: of_linen(repeated(linen.Dense)(3, **_OFF), (9, 3)),
    "nnx.Linear": lambda: of_nnx(nnx.Linear(5, 4, rngs=_RNGS, **_OFF), (9, 5)),
    "nnx.LinearGeneral to heads": lambda: of_nnx(nnx.LinearGeneral(5, (2, 3), rngs=_RNGS, **_OFF), (9, 5)),
    "nnx.LinearGeneral from heads": lambda: of_nnx(
        nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=_RNGS, **_OFF), (9, 2, 3)
    ),
    "nnx.Einsum": lambda: of_nnx(nnx.Einsum("abc,cde->abde", (5, 2, 4), rngs=_RNGS), (9, 3, 5)),
    "equinox.Linear": lambda: of_equinox(eqx.nn.Linear(5, 4, key=KEY, **_OFF), (9, 5), right_by_shape=True),
    "haiku.Linear": lambda: of_haiku(lambda: hk.Linear(4, with_bias=False), (9, 5)),
    # Convolutions: [kernel…, in/groups, out].
    "linen.Conv 1-D": lambda: of_linen(linen.Conv(4, (3,), padding="VALID", **_OFF), (3, 8, 5)),
    "linen.Conv 2-D": lambda: of_linen(linen.Conv(4, (3, 2), padding="VALID", **_OFF), (3, 8, 7, 5)),
    "linen.Conv with groups": lambda: of_linen(
        linen.Conv(6, (3,), feature_group_count=2, padding="VALID", **_OFF), (3, 8, 4)
    ),
    "linen.Conv depthwise": lambda: of_linen(
        linen.Conv(8, (3, 2), feature_group_count=4, padding="VALID", **_OFF), (3, 8, 7, 4)
    ),
    "linen.ConvLocal": lambda: of_linen(linen.ConvLocal(4, (3,), padding="VALID", **_OFF), (3, 5, 5)),
    "linen.Conv repeated": lambda: of_linen(repeated(linen.Conv)(4, (3,), padding="VALID", **_OFF), (3, 8, 5)),
    "nnx.Conv with groups": lambda: of_nnx(
        nnx.Conv(4, 6, (3,), feature_group_count=2, padding="VALID", rngs=_RNGS, **_OFF), (3, 8, 4)
    ),
    "nnx.Conv 2-D": lambda: of_nnx(nnx.Conv(5, 4, (3, 2), padding="VALID", rngs=_RNGS, **_OFF), (3, 8, 7, 5)),
    "equinox.Conv2d": lambda: of_equinox(
        eqx.nn.Conv2d(5, 4, (3, 2), key=KEY, **_OFF), (3, 5, 8, 7), right_by_shape=True
    ),
    "equinox.Conv1d with groups": lambda: of_equinox(
        eqx.nn.Conv1d(4, 6, 3, groups=2, key=KEY, **_OFF), (3, 4, 8), right_by_shape=True
    ),
    "haiku.Conv2D": lambda: of_haiku(lambda: hk.Conv2D(4, (3, 2), padding="VALID", with_bias=False), (3, 8, 7, 5)),
    "haiku.Conv1D with groups": lambda: of_haiku(
        lambda: hk.Conv1D(6, 3, padding="VALID", feature_group_count=2, with_bias=False), (3, 8, 4)
    ),
    "haiku.DepthwiseConv2D": lambda: of_haiku(
        lambda: hk.DepthwiseConv2D(2, (3, 2), padding="VALID", with_bias=False), (3, 8, 7, 4)
    ),
    # Transposed convolutions: a unit is an output channel and a phase of the stride.
    "linen.ConvTranspose": lambda: of_linen(linen.ConvTranspose(4, (3,), padding="VALID", **_OFF), (3, 8, 5)),
    "linen.ConvTranspose strided": lambda: of_linen(
        linen.ConvTranspose(4, (4, 3), (2, 1), padding="VALID", **_OFF), (3, 8, 7, 5)
    ),
    "linen.ConvTranspose, kernel of the convolution": lambda: of_linen(
        linen.ConvTranspose(4, (6,), (3,), padding="VALID", transpose_kernel=True, **_OFF), (3, 8, 5)
    ),
    "linen.ConvTranspose dilated": lambda: of_linen(
        linen.ConvTranspose(4, (4,), (2,), kernel_dilation=(3,), padding="VALID", **_OFF), (3, 12, 5)
    ),
    "linen.ConvTranspose without overlap": lambda: of_linen(
        linen.ConvTranspose(4, (2,), (2,), padding="VALID", **_OFF), (3, 8, 5)
    ),
    "nnx.ConvTranspose strided": lambda: of_nnx(
        nnx.ConvTranspose(5, 4, (4,), (2,), padding="VALID", rngs=_RNGS, **_OFF), (3, 8, 5)
    ),
    "nnx.ConvTranspose, kernel of the convolution": lambda: of_nnx(
        nnx.ConvTranspose(5, 4, (3,), padding="VALID", transpose_kernel=True, rngs=_RNGS, **_OFF), (3, 8, 5)
    ),
    "equinox.ConvTranspose1d": lambda: of_equinox(
        eqx.nn.ConvTranspose1d(5, 4, 3, key=KEY, **_OFF), (3, 5, 8), right_by_shape=True
    ),
    "equinox.ConvTranspose1d strided": lambda: of_equinox(
        eqx.nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2, key=KEY, **_OFF), (3, 4, 8)
    ),
    "haiku.Conv1DTranspose strided": lambda: of_haiku(
        lambda: hk.Conv1DTranspose(4, 4, 2, padding="VALID", with_bias=False), (3, 8, 5)
    ),
    "haiku.Conv2DTranspose": lambda: of_haiku(
        lambda: hk.Conv2DTranspose(4, (3, 2), padding="VALID", with_bias=False), (3, 8, 7, 5)
    ),
}
