"""Attach Gradient Centralization to any torch optimizer, or call it in a hand-written loop."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.projection import center, center_, subtract_means_, unit_means
from gradcentral.vectors import WeightVectors

__all__ = ["PLACEMENTS", "Handle", "attached", "centralize", "centralize_gradients"]

PLACEMENTS = ("gradient", "update")

_Hook = tuple[tuple[Any, ...], dict[str, Any]]


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
    _check_placement(placement)
    optimizer = _with_hooks(optimizer)
    layout = _layout(model, layout)
    handle = Handle(layout, placement)
    targets = _targets(optimizer, handle)
    _refuse_nothing_to_center(optimizer, layout, targets)
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
    _center_gradients(layout, list(layout.items()))


class Handle:
    """What `centralize` returns: the layout in use, and the way to pause or end it.

    Attributes:
        layout: the `WeightLayout` in use.
        placement: ``"gradient"`` or ``"update"``.
    """

    def __init__(self, layout: WeightLayout, placement: str) -> None:
        self.layout = layout
        self.placement = placement
        self._paused = 0
        self._hooks: list[Any] = []
        # Means of the weight vectors before the step under way, for placement "update".
        self._means: list[tuple[Tensor, WeightVectors, Tensor]] = []
        self._strangers: set[Tensor] = set()

    def remove(self) -> None:
        """End it: the optimizer is plain again. Calling it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._means.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps taken inside the ``with`` block are plain ones."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __repr__(self) -> str:
        state = "removed" if not self._hooks else "paused" if self._paused else "active"
        return f"<gradcentral handle, {state}: placement {self.placement!r}, {self.layout.summary()}>"

    def _attach(self, optimizer: Optimizer) -> None:
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self.placement == "update":
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Hook | None:
        self._means.clear()
        if self._paused:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self.placement == "update":
            targets = _targets(optimizer, self)
            if closure is not None and self.layout.pending:
                raise RuntimeError(
                    "lazy parameters get their values inside this step's closure, so that there is no weight to keep "
                    "the mean of: run one forward of the model before the first step"
                )
            with torch.no_grad():
                self._means = [(w, vectors, unit_means(w, vectors)) for w, vectors in targets]
            return None
        if closure is not None:
            # torch gives (optimizer, *arguments of step); the closure is the first of them.
            return (args[0], self._centering(optimizer, closure), *args[2:]), {
                name: value for name, value in kwargs.items() if name != "closure"
            }
        _center_gradients(self.layout, _targets(optimizer, self))
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # w ← w_new − (mean(w_new) − mean(w_old)) is w_old + Φ(Δw), without a copy of w_old.
        with torch.no_grad():
            for w, vectors, old_means in self._means:
                subtract_means_(w, unit_means(w, vectors) - old_means, vectors)
        self._means.clear()

    def _centering(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        # The gradients appear inside step(), each time it calls the closure.
        @functools.wraps(closure)
        def centered_closure() -> Any:
            loss = closure()
            _center_gradients(self.layout, _targets(optimizer, self))
            return loss

        return centered_closure


def attached(optimizer: Optimizer) -> list[Handle]:
    """The handles that `centralize` has put on an optimizer and that have not been removed."""
    hooks = getattr(_with_hooks(optimizer), "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, Handle)]


def _targets(optimizer: Optimizer, handle: Handle) -> list[tuple[Tensor, WeightVectors]]:
    """The optimizer's parameters that are centered, with their weight vectors, as they are now."""
    layout = handle.layout
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if not layout.knows(p) and p not in handle._strangers]
    if new or layout.pending:
        layout.refresh()
        strangers = [p for p in new if not layout.knows(p)]
        handle._strangers.update(strangers)
        if strangers and handle._hooks:
            shapes = ", ".join(str(tuple(p.shape)) for p in strangers)
            warnings.warn(
                f"the optimizer got parameters that are not the model's, of shape {shapes}: they are left alone; "
                "call gradcentral.centralize on the optimizer with their model too",
                stacklevel=3,
            )
    return [(p, layout[p]) for p in parameters if p in layout]


def _center_gradients(layout: WeightLayout, targets: list[tuple[Tensor, WeightVectors]]) -> None:
    with torch.no_grad():
        for parameter, vectors in targets:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                name = layout.names[parameter]
                raise ValueError(
                    f"{name} has a sparse gradient, and centering would fill its zeros: leave it alone with "
                    f"layout=weight_layout(model, exclude=[{name!r}]), or make the gradient dense (sparse=False)"
                )
            if _is_expanded(gradient):
                parameter.grad = center(gradient, vectors)
            else:
                center_(gradient, vectors)


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


def _check_placement(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be {' or '.join(map(repr, PLACEMENTS))}, not {placement!r}")


def _with_hooks(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, or the one that a wrapper such as accelerate's AcceleratedOptimizer steps."""
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, not {type(optimizer).__name__}")
    return inner


def _refuse_nothing_to_center(
    optimizer: Optimizer, layout: WeightLayout, targets: list[tuple[Tensor, WeightVectors]]
) -> None:
    if targets or layout.pending:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(layout.knows(p) for p in parameters):
        raise ValueError(
            "none of the model's parameters is in the optimizer: give the model whose parameters it was made with "
            "(make the optimizer after moving, wrapping or sharding the model)"
        )
    held = {layout.names[p] for p in parameters if layout.knows(p)}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in layout.skipped.items() if name in held)
    raise ValueError(f"nothing is left to center in this optimizer ({reasons})")


def _same_as_attached(
    optimizer: Optimizer, handle: Handle, targets: list[tuple[Tensor, WeightVectors]]
) -> Handle | None:
    """The handle that does just this already; raises where one does something else to the same parameters."""
    wanted = dict(targets)
    for other in attached(optimizer):
        present = dict(_targets(optimizer, other))
        if wanted and wanted == present and other.placement == handle.placement:
            return other
        for parameter in wanted:
            if parameter in present:
                raise ValueError(
                    f"{handle.layout.names[parameter]} is centered in this optimizer already (placement "
                    f"{other.placement!r}, {len(present)} parameters; asked for: {handle.placement!r}, {len(wanted)}): "
                    "call remove() on the first handle, gradcentral.centralize.attached(optimizer)[0], before this"
                )
    return None
