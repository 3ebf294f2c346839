"""`centralize`, a gradient transformation; the formulas are those of `gradcentral.projection`, in JAX."""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradcentral.integrations.named_layout import NamedEntry, NamedLayout
from gradcentral.integrations.optax.models import weight_layout
from gradcentral.integrations.optax.names import Names
from gradcentral.weight_vectors import WeightVectors

__all__ = ["centralize"]

PLACEMENTS = ("gradient", "regularized", "update")
_LOG = logging.getLogger("gradcentral")


def centralize(
    layout: NamedLayout | Any, placement: str = "gradient", strength: Any = 1.0, weight_decay: Any = None
) -> optax.GradientTransformation:
    """Return a gradient transformation that centers each weight vector of what passes through it.

    In a chain, the placement determines the position::

        optax.chain(centralize(layout), optax.adamw(1e-3))                             # Φ(g)
        optax.chain(optax.adamw(1e-3), centralize(layout, "update"))                   # Φ(Δw)
        optax.chain(centralize(layout, "regularized", weight_decay=5e-4),              # Φ(g + λw)
                    optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))

    Args:
        layout: a `weight_layout`, or anything that `weight_layout` accepts, such as the parameters of a Flax linen
            model. Its parameters are those that the optimizer is initialized with.
        placement: ``"gradient"``, in front of the optimizer: g ← Φ(g). ``"regularized"``, in front of
            ``optax.add_decayed_weights``: g ← Φ(g) − λ·mean(w), so that g + λw is centered. ``"update"``, at the end of
            the chain: Δw ← Φ(Δw), weight decay included; an update that is not finite is passed on unchanged. The means
            of the weights then stay what they were.
        strength: fraction s of each mean that is subtracted, between 0 and 1; a number or a 0-dim array. With
            ``optax.inject_hyperparams``, it may follow a schedule.
        weight_decay: λ of ``"regularized"``, the same as that of ``optax.add_decayed_weights``.

    Returns:
        An ``optax.GradientTransformation`` without state. It can be compiled, vectorized and sharded. A mean is
        computed in float32 or wider.

    Raises:
        ValueError: the placement is unknown, the strength or the weight decay is out of range, ``weight_decay`` is
            missing or would be ignored; when the optimizer is initialized: nothing to center, or a parameter that the
            layout does not have in this shape.
        TypeError: the strength or the weight decay is not a number.

    Source: Yong et al. 2020, eq. 1, section 3.4.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = {"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> optimizer = optax.chain(centralize(params), optax.sgd(1.0))
        >>> grads = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]), "bias": jnp.ones(2)}}
        >>> updates, state = optimizer.update(grads, optimizer.init(params))
        >>> print(updates["Dense_0"]["kernel"])
        [[ 2.  1.]
         [ 1.  1.]
         [-3. -2.]]
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; choose from {', '.join(map(repr, PLACEMENTS))}")
    if placement == "regularized" and weight_decay is None:
        raise ValueError(
            'placement "regularized" needs weight_decay=, the same number as in optax.add_decayed_weights; '
            'without weight decay, use placement="gradient"'
        )
    if placement != "regularized" and weight_decay is not None:
        raise ValueError(f'weight_decay= has no effect with placement "{placement}"; use placement="regularized"')
    _check_number("strength", strength, maximum=1)
    if weight_decay is not None:
        _check_number("weight_decay", weight_decay)
    decided = layout if isinstance(layout, NamedLayout) else weight_layout(layout)
    _check_anything_to_center(decided, [*decided.entries])
    names = Names(decided)

    def init(params: optax.Params) -> optax.EmptyState:
        entries = [names.entry(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
        _check_anything_to_center(decided, entries)
        _LOG.info("optax: placement %r; %s", placement, decided.summary())
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if placement != "regularized":
            return names.map(_center if placement == "gradient" else _center_finite, updates, strength), state
        if params is None:
            raise ValueError(
                'placement "regularized" needs the parameters: call optimizer.update(grads, state, params)'
            )
        return names.map(_center_regularized, updates, strength, weight_decay, beside=params), state

    return optax.GradientTransformation(init, update)


def _check_number(name: str, value: Any, maximum: float | None = None) -> None:
    if callable(value):
        raise TypeError(
            f"{name} must be a number, not a schedule: use optax.inject_hyperparams(centralize, "
            f'static_args=("layout", "placement"))(layout, placement, {name}=schedule)'
        )
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a 0-dim array, not {value!r}")
    if jnp.ndim(value):
        raise ValueError(f"{name} must be a number or a 0-dim array, not one of shape {jnp.shape(value)}")
    if isinstance(value, jax.core.Tracer):  # its value is not available
        return
    if not 0 <= float(value) <= (math.inf if maximum is None else maximum):
        limits = "at least 0" if maximum is None else f"between 0 and {maximum}"
        raise ValueError(f"{name} must be {limits}, not {float(value)}")


def _check_anything_to_center(layout: NamedLayout, entries: list[NamedEntry]) -> None:
    if any(entry.vectors is not None for entry in entries):
        return
    if unknown := [entry for entry in entries if entry.unknown]:
        raise ValueError(
            f"nothing to center: {unknown[0].name}: {unknown[0].reason}. {layout.hint or 'Give its axes'}, or "
            f"weight_layout(model, overrides={{{unknown[0].name!r}: '[i] o'}})"
        )
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries[:3])
    raise ValueError(
        f"nothing to center among these {len(entries)} parameters: {reasons or 'there are none'}. Leave centralize out "
        "of their optimizer"
    )


def _mean(array: jax.Array, vectors: WeightVectors) -> jax.Array:
    """Return the mean of each weight vector, with the shape of the view, where the spanned axes have size 1."""
    # A sum of a thousand half-precision numbers is too inaccurate for their mean, so accumulate in float32.
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return wide.reshape(vectors.dims).mean(vectors.span, keepdims=True)


def _subtract(array: jax.Array, means: jax.Array, vectors: WeightVectors) -> jax.Array:
    return (array.reshape(vectors.dims) - means).reshape(array.shape).astype(array.dtype)


def _scaled(means: jax.Array, strength: Any) -> jax.Array:
    """Return s·mean; 0 for a strength of 0, even if the mean is not finite."""
    if isinstance(strength, (int, float)) and strength == 1:
        return means
    return jnp.where(strength == 0, 0, strength * means).astype(means.dtype)


def _center(array: jax.Array, vectors: WeightVectors, strength: Any) -> jax.Array:
    return _subtract(array, _scaled(_mean(array, vectors), strength), vectors)


def _center_finite(array: jax.Array, vectors: WeightVectors, strength: Any) -> jax.Array:
    shift = _scaled(_mean(array, vectors), strength)
    return _subtract(array, jnp.where(jnp.isfinite(shift), shift, 0), vectors)


def _center_regularized(
    array: jax.Array, vectors: WeightVectors, strength: Any, weight_decay: Any, weights: jax.Array
) -> jax.Array:
    means = _mean(array, vectors)
    if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):  # else an infinite weight would give NaN
        means = means + weight_decay * _mean(weights, vectors)
    return _subtract(array, _scaled(means, strength), vectors)
