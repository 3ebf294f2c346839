"""Attach Gradient Centralization to any torch optimizer, or center gradients in a hand-written loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.distributed import Shards
from gradcentral.kernels import Centering, Means
from gradcentral.kernels.compiled import TracedCentering
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.local_shard import local, overlaps_itself
from gradcentral.projection import Pair, center
from gradcentral.targets import Targets, check_placement, layout_to_use, refuse_sparse, shards_in_layout

__all__ = [
    "Handle",
    "attached",
    "centering_of",
    "centralize",
    "centralize_gradients",
    "closure_of",
    "hooked_optimizer",
    "replace_closure",
]

HookedCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a step, which a pre-hook may replace."""


def centralize(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    placement: str = "gradient",
    *,
    layout: WeightLayout | None = None,
) -> Handle:
    """Attach Gradient Centralization to an optimizer: one line, for any ``torch.optim.Optimizer``.

    Every subsequent ``optimizer.step()`` centers. Clipping that runs before ``step()`` sees the gradients as autograd
    left them, as in the authors' code. A closure (LBFGS; Lightning always passes one) is wrapped, so that the gradients
    it computes are centered too.

    Args:
        optimizer: holds parameters of the model; its other parameters are not centered.
        model: determines the layout (see `weight_layout`).
        placement: ``"gradient"``: the optimizer receives Φ(∂L/∂w), written into ``p.grad`` in place (algorithms 1 and
            2 of the paper). ``"update"``: w ← w + Φ(Δw), Δw the whole change that the step makes, weight decay
            included; ``p.grad`` is unchanged. For SGD with momentum and L2 this equals centering g + λw. Weight vectors
            that are not finite, such as those of a masked class, have no mean and are not shifted.
        layout: use this layout instead of the model's default: ``weight_layout(model, only="conv")``, or
            ``WeightLayout.from_shapes(params)`` if there is no model.

    Returns:
        A `Handle`: ``.layout``, ``.remove()``, ``.paused()``. Attaching again with the same settings returns the
        existing handle.

    Raises:
        ValueError: an unknown placement; neither or both of model and layout; none of the model's parameters is in the
            optimizer; nothing is left to center; a parameter is already centered with other settings.
        TypeError: the optimizer has no step hooks.

    Note:
        In torch a copy of an optimizer (``copy.deepcopy``, pickle, ``torch.save(optimizer)``) has no hooks: call
        `centralize` on the copy. ``state_dict`` and ``load_state_dict`` are unaffected.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = gradcentral.centralize(optimizer, model)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(model.weight.grad.mean(1).abs().max() < 1e-6)
        True
    """
    optimizer = hooked_optimizer(optimizer)
    if isinstance(getattr(optimizer, "targets", None), Targets):
        raise ValueError(f"gradcentral.{type(optimizer).__name__} already centers: pass placement= when you create it")
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "this ZeroRedundancyOptimizer steps inside DDP's communication, where no hook fires: create it with "
            "overlap_with_ddp=False"
        )
    check_placement(placement)
    handle = Handle(layout_to_use(model, layout), placement)
    shards = handle.targets.attach(optimizer)
    if (existing := _same_as_attached(optimizer, handle, shards.pairs)) is not None:
        return existing
    handle._attach(optimizer)
    return handle


def centralize_gradients(model: nn.Module | None = None, *, layout: WeightLayout | None = None) -> None:
    """Center every gradient of a model now: in a hand-written loop, after ``unscale_`` and around clipping.

    Args:
        model: its layout is determined at the first call and kept until its parameters change.
        layout: use this layout instead.

    Raises:
        ValueError: neither or both of model and layout; nothing to center; a sparse gradient (with its name).

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> gradcentral.centralize_gradients(model)
    """
    layout = _remembered_layout(model) if model is not None and layout is None else layout_to_use(model, layout)
    if not layout and not layout.pending:
        raise ValueError(f"nothing to center: {layout.summary()}")
    _center_gradients(layout, shards_in_layout(layout, list(layout.items())), Centering())


class _BeforeStep(NamedTuple):
    """State that placement "update" keeps during a step: the tensors and the means of their weight vectors."""

    shards: Shards
    pairs: list[Pair]
    means: Means
    split_sums: list[Tensor]


class Handle:
    """Handle of the centering that `centralize` attached: the layout in use, and methods to pause and remove it.

    To change the settings, remove the handle and attach again.

    Attributes:
        targets: the parameters that are centered; see `Targets`.
    """

    def __init__(self, layout: WeightLayout, placement: str) -> None:
        self.targets = Targets(layout, placement)
        self._pauses = 0
        self._hooks: list[Any] = []
        self._centering = Centering()
        self._before: _BeforeStep | None = None

    @property
    def layout(self) -> WeightLayout:
        """The layout in use."""
        return self.targets.layout

    @property
    def placement(self) -> str:
        """``"gradient"`` or ``"update"``."""
        return self.targets.placement

    def remove(self) -> None:
        """Stop centering: the optimizer steps as it did before. Calling this twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._before = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager: steps inside the ``with`` block do not center."""
        self._pauses += 1
        self.targets.paused = True
        try:
            yield
        finally:
            self._pauses -= 1
            self.targets.paused = self._pauses > 0

    def __repr__(self) -> str:
        state = "removed" if not self._hooks else "paused" if self.targets.paused else "active"
        return f"<gradcentral handle, {state}: placement {self.placement!r}, {self.layout.summary()}>"

    def _attach(self, optimizer: Optimizer) -> None:
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self.placement == "update":
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCall | None:
        self._before = None
        self.targets.check(optimizer)
        if self.targets.paused:
            return None
        closure = closure_of(args, kwargs)
        if self.placement == "update":
            self._keep_means(optimizer, closure)
        elif closure is not None:
            return replace_closure(args, kwargs, self._centering_closure(optimizer, closure))
        else:
            self._center(optimizer)
        return None

    def _keep_means(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        shards = self.targets.current(optimizer)
        if closure is not None and self.layout.pending:
            raise RuntimeError(
                "lazy parameters receive their values inside this step's closure, so there are no means to keep yet: "
                "run one forward pass of the model before the first step"
            )
        with torch.no_grad():
            # Frozen parameters do not change; their types, such as float8, may not even have a mean.
            pairs = [(local(p), vectors) for p, vectors in shards.whole if p.requires_grad or p.grad is not None]
            means = _eager_or_traced(self._centering).means(pairs)
            self._before = _BeforeStep(shards, pairs, means, shards.split_sums())

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (before := self._before) is not None:
            with torch.no_grad():
                _eager_or_traced(self._centering).restore_(before.pairs, before.means)
                before.shards.restore_split_means_(before.split_sums)
        self._before = None

    def _centering_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        # The gradients appear inside step(), each time it calls the closure.
        @functools.wraps(closure)
        def centering_closure() -> Any:
            loss = closure()
            self._center(optimizer)
            return loss

        return centering_closure

    def _center(self, optimizer: Optimizer) -> None:
        _center_gradients(self.layout, self.targets.current(optimizer), self._centering)


def attached(optimizer: Optimizer) -> list[Handle]:
    """Return the handles that `centralize` has attached to an optimizer and that have not been removed."""
    hooks = getattr(hooked_optimizer(optimizer), "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, Handle)]


def centering_of(optimizer: Optimizer) -> list[Targets]:
    """Return everything that centers in this optimizer's step: its own centering and what `centralize` has attached.

    The list is empty for a plain optimizer. All code that needs to find out what an optimizer centers calls this.
    """
    own = getattr(optimizer, "targets", None)
    of_handles = [handle.targets for handle in attached(optimizer)]
    return [own, *of_handles] if isinstance(own, Targets) else of_handles


def hooked_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer whose step hooks fire: itself, or the one inside a wrapper such as accelerate's.

    Raises:
        TypeError: it is not a ``torch.optim.Optimizer`` with step hooks.
    """
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, not {type(optimizer).__name__}")
    return inner


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the closure among a step hook's arguments: torch passes (optimizer, *arguments of step)."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def replace_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> HookedCall:
    """Return what a step pre-hook must return so that ``step`` receives this closure instead of its own."""
    return (args[0], closure, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}


def _eager_or_traced(centering: Centering) -> Centering | TracedCentering:
    return _TRACED if torch.compiler.is_compiling() else centering


_TRACED = TracedCentering()


def _center_gradients(layout: WeightLayout, shards: Shards, centering: Centering) -> None:
    traced = torch.compiler.is_compiling()
    if not shards.sharded and not traced:
        # Nothing is sharded. Sparse and overlapping gradients, which need the checks below, never fit a plan.
        pairs = [(p.grad, vectors) for p, vectors in shards.whole if p.grad is not None]
        if centering.center_if_planned_(pairs):
            return
    with torch.no_grad():
        shards.place_gradients(p for p, _ in shards.pairs)
        _eager_or_traced(centering).center_all_(_writable_gradients(layout, shards.whole))
        shards.center_split_gradients_()


def _writable_gradients(layout: WeightLayout, targets: list[Pair]) -> list[Pair]:
    """Return the local gradients that can be centered in place; overlapping ones are replaced by centered copies."""
    pairs = []
    for parameter, vectors in targets:
        gradient = parameter.grad
        if gradient is None:
            continue
        refuse_sparse(gradient, parameter, layout)
        held = local(gradient)
        if overlaps_itself(held):
            parameter.grad = center(gradient, vectors)
        else:
            pairs.append((held, vectors))
    return pairs


_layouts: weakref.WeakKeyDictionary[nn.Module, WeightLayout] = weakref.WeakKeyDictionary()


def _remembered_layout(model: nn.Module) -> WeightLayout:
    layout = _layouts.get(model)
    if layout is None:
        layout = _layouts[model] = weight_layout(model)
    elif layout.pending or set(layout.names) != set(model.parameters()):
        layout.refresh()
    return layout


def _same_as_attached(optimizer: Optimizer, handle: Handle, targets: list[Pair]) -> Handle | None:
    """Return an attached handle with the same parameters and settings; raise if one centers them differently."""
    wanted = dict(targets)
    for position, other in enumerate(attached(optimizer)):
        present = dict(other.targets.current(optimizer).pairs)
        if wanted and wanted == present and other.placement == handle.placement:
            return other
        for parameter in wanted:
            if parameter in present:
                raise ValueError(
                    f"{handle.layout.names[parameter]} is already centered in this optimizer (placement "
                    f"{other.placement!r}, {len(present)} parameters; requested: {handle.placement!r}, {len(wanted)}): "
                    f"remove that handle first: gradcentral.attached(optimizer)[{position}].remove()"
                )
    return None
