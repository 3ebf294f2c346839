"""Centering the gradients of a model in place: `centralize_gradients`, and the centering of an attached handle."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn

from gradcentral.distributed import Shards
from gradcentral.kernels import Centering
from gradcentral.kernels.compiled import TracedCentering
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.local_shard import local, overlaps_itself
from gradcentral.projection import Pair, Strength, as_number, center_regularized, checked_strength
from gradcentral.strengths import Strengths
from gradcentral.targets import layout_to_use, refuse_sparse, shards_in_layout
from gradcentral.weight_decay import L2
from gradcentral.weight_vectors import WeightVectors

__all__ = ["center_gradients_", "centralize_gradients", "eager_or_traced", "refuse_empty", "refuse_per_sample"]
__all__ += ["remembered_layout"]


def centralize_gradients(
    model: nn.Module | None = None, *, layout: WeightLayout | None = None, strength: Strength = 1.0
) -> None:
    """Center every gradient of a model now: in a hand-written loop, after ``unscale_`` and around clipping.

    If none of the parameters has a gradient, it warns, once per layout.

    Args:
        model: its layout is determined at the first call and kept until its parameters change.
        layout: use this layout instead.
        strength: from 0 (off) to 1 (GC): g − s·mean(g). Only with 1, a second call changes nothing.

    Raises:
        ValueError: neither or both of model and layout; nothing to center; a sparse gradient (with its name);
            a strength that is not between 0 and 1; per-sample gradients (Opacus), from which the gradient is computed
            later.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> gradcentral.centralize_gradients(model)
    """
    strength = as_number(checked_strength(strength))
    layout = remembered_layout(model) if model is not None and layout is None else layout_to_use(model, layout)
    if not torch.compiler.is_compiling():
        layout.follow()
    refuse_empty(layout)
    for p in layout:
        refuse_per_sample(p, layout)
    if not torch.compiler.is_compiling() and all(p.grad is None for p in layout):
        _warn_without_gradients(layout)
    # Dynamo of torch 2.8 does not trace list(layout.items()).
    shards = shards_in_layout(layout, [(p, layout[p]) for p in layout])
    center_gradients_(layout, shards, Centering(), None, Strengths(strength, {}))


def refuse_empty(layout: WeightLayout) -> None:
    """Refuse a layout that centers nothing.

    Raises:
        ValueError: with suggestions for unknown layers.
    """
    if not layout and not layout.pending:
        raise ValueError(f"nothing to center: {layout.summary()}\n{layout.to_paste()}".rstrip())


def refuse_per_sample(parameter: Tensor, layout: WeightLayout) -> None:
    """Refuse a parameter whose gradient is computed later.

    Raises:
        ValueError: it has per-sample gradients, or their norms (with its name and a remedy).
    """
    for attribute in ("grad_sample", "_norm_sample"):  # of Opacus; the latter in its mode "ghost"
        if getattr(parameter, attribute, None) is not None:
            raise ValueError(
                f"{layout.names[parameter]} has per-sample gradients ({attribute}), from which Opacus computes p.grad "
                "inside its step: attach to the optimizer instead, with gradcentral.centralize(optimizer, model)"
            )


def center_gradients_(
    layout: WeightLayout, shards: Shards, centering: Centering, l2: L2 | None, strengths: Strengths
) -> None:
    """Center the gradients of some of a layout's parameters in place; overlapping ones are replaced by copies.

    Args:
        layout: their layout.
        shards: the parameters.
        centering: the plans.
        l2: the weight decay, for placement "regularized"; None for "gradient".
        strengths: s of P_s for each parameter.
    """
    if l2 is not None and not l2.factors:
        l2 = None
    if shards.sharded:
        with torch.no_grad():
            shards.place_gradients(p for p, _ in shards.pairs)
    for position, (strength, targets) in enumerate(strengths.divide(shards.whole)):
        if isinstance(strength, Tensor) or strength != 0:
            of_part = centering.part(position)
            if shards.sharded or l2 is not None or not _center_if_planned_(targets, of_part, strength):
                _center_whole_(layout, targets, of_part, l2, strength)
    if shards.split:
        with torch.no_grad():
            shards.center_split_gradients_(l2, strengths)


def _center_if_planned_(targets: list[Pair], centering: Centering, strength: Strength) -> bool:
    """Center plain gradients as in the last step if they have the same forms; return whether they do.

    Sparse and overlapping gradients, which need the checks of `_writable_gradients`, never fit a plan.
    """
    if torch.compiler.is_compiling():
        return False
    pairs = [(gradient, vectors) for p, vectors in targets if (gradient := p.grad) is not None]
    return centering.center_if_planned_(pairs, strength)


@torch.no_grad()
def _center_whole_(
    layout: WeightLayout, targets: list[Pair], centering: Centering, l2: L2 | None, strength: Strength
) -> None:
    found = _writable_gradients(layout, targets, l2, strength)
    pairs = [(gradient, vectors) for _, gradient, vectors in found]
    if l2 is None:
        eager_or_traced(centering).center_all_(pairs, strength)
        return
    weights = [local(p) for p, _, _ in found]
    factors = [l2.factors.get(p, 0.0) for p, _, _ in found]
    eager_or_traced(centering).center_regularized_(pairs, weights, factors, l2.grad_scale, strength)


def eager_or_traced(centering: Centering) -> Centering | TracedCentering:
    """Return the centering itself, or its counterpart while ``torch.compile`` traces."""
    return _TRACED if torch.compiler.is_compiling() else centering


_TRACED = TracedCentering()


def _writable_gradients(
    layout: WeightLayout, targets: list[Pair], l2: L2 | None, strength: Strength
) -> list[tuple[Tensor, Tensor, WeightVectors]]:
    """Return each parameter with its local gradient that can be centered in place, and their weight vectors.

    Overlapping gradients are replaced by centered copies.
    """
    found = []
    for parameter, vectors in targets:
        gradient = parameter.grad
        if gradient is None:
            continue
        refuse_sparse(gradient, parameter, layout)
        held = local(gradient)
        if overlaps_itself(held):
            factor = 0.0 if l2 is None else l2.of(parameter)
            parameter.grad = center_regularized(gradient, parameter, factor, vectors, strength)
        else:
            found.append((parameter, held, vectors))
    return found


_layouts: weakref.WeakKeyDictionary[nn.Module, WeightLayout] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[WeightLayout] = weakref.WeakSet()


def remembered_layout(model: nn.Module) -> WeightLayout:
    """Return the layout of a model, determined at the first call; lazy parameters may have received shapes since."""
    layout = _layouts.get(model)
    if layout is None:
        layout = _layouts[model] = weight_layout(model)
    elif layout.pending:
        layout.refresh()
    return layout


def _warn_without_gradients(layout: WeightLayout) -> None:
    if layout in _warned:
        return
    _warned.add(layout)
    warnings.warn(
        "centralize_gradients centered nothing, because no parameter has a gradient: call it after backward() and "
        "before zero_grad(); center the gradients of torch.func with gradcentral.center(gradient, layout[name]); where "
        "p.grad is None in every step (DeepSpeed's ZeRO), center each gradient when backward() computes it: "
        "gradcentral.centralize_in_backward(model)",
        stacklevel=3,
    )
