"""The axes of each layer of Flax, Equinox and Haiku, by the weights that reach an output and by theorem 4.1."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("optax", reason="needs optax: run `make jax`")
pytest.importorskip("flax", reason="needs flax: run `make jax`")
pytest.importorskip("equinox", reason="needs equinox: run `make jax`")
pytest.importorskip("haiku", reason="needs haiku: run `make jax`")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradcentral.integrations.optax import centralize
from tests.integrations.jax_layers import LAYERS, Layer

GAMMA = 0.7
# Compiling takes most of the time of these tests.
FAST: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def _float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def _vectors_of(layer: Layer) -> set[frozenset[int]]:
    """Return the elements of each weight vector of a layer's one parameter."""
    (name,) = layer.layout
    vectors = layer.layout[name]
    elements = np.arange(math.prod(vectors.dims)).reshape(vectors.dims)
    units = np.moveaxis(elements, vectors.span, range(-len(vectors.span), 0)).reshape(vectors.count, vectors.fan_in)
    return {frozenset(unit.tolist()) for unit in units}


class Measured(NamedTuple):
    """What one compiled call computes for a layer."""

    layer: Layer
    reaching: list[frozenset[int]]  # the elements of the parameter that reach each output
    changes: dict[str, tuple[np.ndarray, np.ndarray]]  # by rule: the change of the outputs, and that of theorem 4.1
    moved: float  # the greatest change of a weight


@functools.cache
def _measured(name: str) -> Measured:
    layer = LAYERS[name]()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layer.params)
    keys = jax.random.split(jax.random.key(1), 3)
    x, other = (jax.random.normal(key, layer.inputs, jnp.float64) for key in keys[:2])
    rules = {"layout": centralize(layer.layout), "axes 1 and up": optax.centralize()}

    def measure(params: Any) -> Any:
        (leaf,), structure = jax.tree.flatten(params)
        jacobian = jax.jacrev(lambda leaf: layer.apply(structure.unflatten([leaf]), jnp.abs(x) + 1).ravel())(leaf)
        target = jax.random.normal(keys[2], layer.apply(params, x).shape)
        gradient = jax.grad(lambda params: jnp.mean((layer.apply(params, 1 + x) - target) ** 2))
        outputs = {}
        for rule in rules:
            optimizer = optax.chain(rules[rule], optax.sgd(0.1, momentum=0.9))

            def step(carry: Any, _: None, optimizer: Any = optimizer) -> Any:
                updates, state = optimizer.update(gradient(carry[0]), carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), None

            (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=5)
            change = layer.apply(after, other + GAMMA) - layer.apply(after, other)
            moved = jnp.abs(jax.tree.leaves(after)[0] - leaf).max()
            outputs[rule] = change.ravel(), layer.apply(params, jnp.full(layer.inputs, GAMMA)).ravel(), moved
        return jacobian, outputs

    jacobian, outputs = jax.tree.map(np.asarray, jax.jit(measure, compiler_options=FAST)(params))
    reaching = [frozenset(np.flatnonzero(row).tolist()) for row in jacobian.reshape(len(jacobian), -1)]
    changes = {rule: (change, expected) for rule, (change, expected, _) in outputs.items()}
    return Measured(layer, reaching, changes, float(outputs["layout"][2]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_vector_is_what_reaches_one_output(name: str) -> None:
    layer, reaching, *_ = _measured(name)
    vectors = _vectors_of(layer)
    assert vectors <= {*reaching}
    assert all(any(reached <= unit for unit in vectors) for reached in reaching), "an edge sees a part of a vector"


def _error(name: str, rule: str) -> float:
    """Return the greatest deviation from theorem 4.1, among the outputs that whole weight vectors reach.

    A constant γ added to the inputs changes an output by γ·Σw⁰, the sum of the initial weights.
    """
    layer, reaching, changes, moved = _measured(name)
    assert moved > 1e-3
    vectors = _vectors_of(layer)
    inner = np.array([reached in vectors for reached in reaching])
    change, expected = changes[rule]
    return float(np.abs(change - expected)[inner].max())


@pytest.mark.parametrize("name", LAYERS)
def test_theorem_4_1_holds(name: str) -> None:
    assert _error(name, "layout") < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_theorem_4_1_fails_for_optax_centralize_as_documented(name: str) -> None:
    error = _error(name, "axes 1 and up")
    assert error < 1e-12 if _measured(name).layer.right_by_shape else error > 1e-4
