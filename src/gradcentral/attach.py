"""Attach Gradient Centralization to any torch optimizer, or call it in a hand-written loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.distributed import Division, Sharding, local
from gradcentral.kernels import Centering, Means
from gradcentral.kernels.compiled import CompilableCentering
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.projection import Pair, center
from gradcentral.targets import PLACEMENTS, Targets, check_placement, refuse_sparse
from gradcentral.weight_vectors import WeightVectors

__all__ = [
    "PLACEMENTS",
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
"""Arguments and keyword arguments, as a step pre-hook may replace them."""


def centralize(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    placement: str = "gradient",
    *,
    layout: WeightLayout | None = None,
) -> Handle:
    """Attach Gradient Centralization to an optimizer: one line, any ``torch.optim.Optimizer``.

    From now on every ``optimizer.step()`` centers. Clipping that runs before ``step()`` sees the gradients as
    autograd left them, as in the authors' code. A closure (LBFGS; Lightning passes one always) is wrapped so that
    the gradients it makes are centered too.

    Args:
        optimizer: holds parameters of the model; those that are not the model's are left alone.
        model: decides the layout (see `weight_layout`).
        placement: ``"gradient"``: the optimizer receives Φ(∂L/∂w), written into ``p.grad`` in place (the paper's
            algorithms 1 and 2). ``"update"``: w ← w + Φ(Δw), Δw the whole change that the step makes, weight
            decay included; ``p.grad`` stays as it is. For SGD with momentum and L2 this equals centering g + λw.
        layout: use this layout instead of the model's default one: ``weight_layout(model, only="conv")``, or
            ``WeightLayout.from_shapes(params)`` where there is no model.

    Returns:
        A `Handle`: ``.layout``, ``.remove()``, ``.paused()``. Attaching again with the same settings returns the
        handle that is there.

    Raises:
        ValueError: an unknown placement; neither or both of model and layout; none of the model's parameters is
            in the optimizer; nothing is left to center; a parameter is centered already with other settings.
        TypeError: the optimizer has no step hooks.

    Note:
        In torch a copy of an optimizer (``copy.deepcopy``, pickle, ``torch.save(optimizer)``) has no hooks: call
        `centralize` on the copy. ``state_dict`` and ``load_state_dict`` are untouched by it.

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
        raise ValueError(f"gradcentral.{type(optimizer).__name__} centers already: give it the placement you want")
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "this ZeroRedundancyOptimizer steps inside DDP's communication, past all hooks: make it with "
            "overlap_with_ddp=False"
        )
    check_placement(placement)
    layout = _layout(model, layout)
    handle = Handle(layout, placement)
    targets = handle.targets.first(optimizer)
    handle._sharding.of(targets)
    if (present := _same_as_attached(optimizer, handle, targets)) is not None:
        return present
    handle._attach(optimizer)
    return handle


def centralize_gradients(model: nn.Module | None = None, *, layout: WeightLayout | None = None) -> None:
    """Center every gradient of a model now: for a hand-written loop, after ``unscale_`` and around clipping.

    Args:
        model: its layout is decided on the first call and kept until its parameters change.
        layout: use this layout instead.

    Raises:
        ValueError: neither or both of model and layout; nothing to center; a sparse gradient (naming it).

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> gradcentral.centralize_gradients(model)
    """
    layout = _remembered_layout(model) if model is not None and layout is None else _layout(model, layout)
    if not layout and not layout.pending:
        raise ValueError(f"nothing to center: {layout.summary()}")
    targets = list(layout.items())
    _center_gradients(layout, targets, CompilableCentering(), Sharding(layout).of(targets))


class _Kept(NamedTuple):
    """The weights and the means of their vectors before the step under way, for placement "update"."""

    pairs: list[Pair]
    means: Means
    division: Division | None
    sums: list[Tensor]
    """Of the weight vectors that are split between ranks."""


class Handle:
    """What `centralize` returns: the layout in use, and the way to pause or end it.

    To change its settings, remove it and attach anew.
    """

    def __init__(self, layout: WeightLayout, placement: str) -> None:
        self._paused = 0
        self._hooks: list[Any] = []
        self.targets = Targets(layout, placement)
        self._centering = CompilableCentering()
        self._sharding = Sharding(layout)
        self._before: _Kept | None = None

    @property
    def layout(self) -> WeightLayout:
        """The layout in use."""
        return self.targets.layout

    @property
    def placement(self) -> str:
        """``"gradient"`` or ``"update"``."""
        return self.targets.placement

    def remove(self) -> None:
        """End it: the optimizer is plain again. Calling it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._before = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps taken inside the ``with`` block are plain ones."""
        self._paused += 1
        self.targets.paused = True
        try:
            yield
        finally:
            self._paused -= 1
            self.targets.paused = self._paused > 0

    def __repr__(self) -> str:
        state = "removed" if not self._hooks else "paused" if self._paused else "active"
        return f"<gradcentral handle, {state}: placement {self.placement!r}, {self.layout.summary()}>"

    def _attach(self, optimizer: Optimizer) -> None:
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self.placement == "update":
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCall | None:
        self._before = None
        self.targets.check(optimizer)
        if self._paused:
            return None
        closure = closure_of(args, kwargs)
        if self.placement == "update":
            targets = self.targets.of(optimizer)
            if closure is not None and self.layout.pending:
                raise RuntimeError(
                    "lazy parameters get their values inside this step's closure, so that there is no weight to keep "
                    "the mean of: run one forward of the model before the first step"
                )
            division = self._sharding.of(targets)
            with torch.no_grad():
                pairs = targets if division is None else division.parts()
                sums = [] if division is None else division.sums()
                self._before = _Kept(pairs, self._centering.means(pairs), division, sums)
            return None
        if closure is not None:
            return replace_closure(args, kwargs, self._centered(optimizer, closure))
        self._center_gradients(optimizer)
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # w ← w_new − (mean(w_new) − mean(w_old)) is w_old + Φ(Δw), without a copy of w_old.
        if (kept := self._before) is not None:
            with torch.no_grad():
                self._centering.restore_(kept.pairs, kept.means)
                if kept.division is not None:
                    kept.division.restore_(kept.sums)
        self._before = None

    def _centered(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        # The gradients appear inside step(), each time it calls the closure.
        @functools.wraps(closure)
        def centered_closure() -> Any:
            loss = closure()
            self._center_gradients(optimizer)
            return loss

        return centered_closure

    def _center_gradients(self, optimizer: Optimizer) -> None:
        targets = self.targets.of(optimizer)
        _center_gradients(self.layout, targets, self._centering, self._sharding.of(targets))


def attached(optimizer: Optimizer) -> list[Handle]:
    """The handles that `centralize` has put on an optimizer and that have not been removed."""
    hooks = getattr(hooked_optimizer(optimizer), "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, Handle)]


def centering_of(optimizer: Optimizer) -> list[Targets]:
    """Everything that centers in this optimizer's step: its own centering and what `centralize` has attached.

    The one answer to "what does this optimizer center?": empty for a plain optimizer.
    """
    own = getattr(optimizer, "targets", None)
    attached_to = [handle.targets for handle in attached(optimizer)]
    return [own, *attached_to] if isinstance(own, Targets) else attached_to


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step hook: torch passes (optimizer, *arguments of step)."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def replace_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> HookedCall:
    """What a step pre-hook returns so that ``step`` receives this closure instead of its own."""
    return (args[0], closure, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}


def _center_gradients(
    layout: WeightLayout, targets: list[Pair], centering: Centering, division: Division | None
) -> None:
    if division is not None:
        with torch.no_grad():
            division.place_gradients(p for p, _ in targets)
            centering.center_(_centerable_in_place(layout, division.whole))
            division.center_gradients_()
        return
    pairs = [(p.grad, vectors) for p, vectors in targets if p.grad is not None]
    if not centering.center_as_planned_(pairs):
        with torch.no_grad():
            centering.center_(_centerable_in_place(layout, targets))


def _centerable_in_place(layout: WeightLayout, targets: list[Pair]) -> list[Pair]:
    """The gradients that can be centered where they are; expanded ones are replaced by centered ones on the way."""
    pairs = []
    for parameter, vectors in targets:
        gradient = parameter.grad
        if gradient is None:
            continue
        refuse_sparse(gradient, parameter, layout)
        held = local(gradient)
        if _is_expanded(held):
            parameter.grad = center(gradient, vectors)
        else:
            pairs.append((held, vectors))
    return pairs


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that nothing can be written in place."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(model: nn.Module | None, layout: WeightLayout | None) -> WeightLayout:
    if layout is not None and not isinstance(layout, WeightLayout):
        raise TypeError(f"layout must be a WeightLayout (weight_layout(model)), not {type(layout).__name__}")
    if model is not None and layout is not None:
        raise ValueError("give model or layout, not both: weight_layout(model, …) makes a layout of your own")
    if layout is not None:
        return layout
    if model is None:
        raise ValueError(
            "give model=, from whose layers the weight vectors are known; without one, "
            "layout=gradcentral.WeightLayout.from_shapes(params) uses the shape rule"
        )
    return weight_layout(model)


_layouts: weakref.WeakKeyDictionary[nn.Module, WeightLayout] = weakref.WeakKeyDictionary()


def _remembered_layout(model: nn.Module) -> WeightLayout:
    layout = _layouts.get(model)
    if layout is None:
        layout = _layouts[model] = weight_layout(model)
    elif layout.pending or set(layout.names) != set(model.parameters()):
        layout.refresh()
    return layout


def hooked_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, or the one that a wrapper such as accelerate's AcceleratedOptimizer steps."""
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, not {type(optimizer).__name__}")
    return inner


def _same_as_attached(
    optimizer: Optimizer, handle: Handle, targets: list[tuple[Tensor, WeightVectors]]
) -> Handle | None:
    """The handle that does just this already; raises where one does something else to the same parameters."""
    wanted = dict(targets)
    for other in attached(optimizer):
        present = dict(other.targets.of(optimizer))
        if wanted and wanted == present and other.placement == handle.placement:
            return other
        for parameter in wanted:
            if parameter in present:
                raise ValueError(
                    f"{handle.layout.names[parameter]} is centered in this optimizer already (placement "
                    f"{other.placement!r}, {len(present)} parameters; asked for: {handle.placement!r}, {len(wanted)}): "
                    "call remove() on the first handle, gradcentral.attached(optimizer)[0], before this"
                )
    return None
