"""`centralize` and `centralize_in_backward` attach Gradient Centralization, and return a `Handle`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcentral.attachment import Attachment, attachments_of
from gradcentral.gradient_hooks import GradientHooks, hooks_of, parameters_to_hook
from gradcentral.layout import WeightLayout
from gradcentral.projection import Pair, Strength, checked_strength
from gradcentral.step_hooks import hooked_optimizer, refuse_unhookable
from gradcentral.strengths import same_strength
from gradcentral.targets import Targets, check_placement, layout_to_use, log_attached
from gradcentral.weight_decay import l2_of

__all__ = ["Handle", "attached", "centering_of", "centralize", "centralize_in_backward"]


def centralize(
    optimizer: Optimizer | Sequence[Optimizer],
    model: nn.Module | None = None,
    placement: str = "gradient",
    *,
    layout: WeightLayout | None = None,
    strength: Strength = 1.0,
) -> Handle:
    """Attach Gradient Centralization to an optimizer: one line, for any ``torch.optim.Optimizer``.

    Every subsequent ``optimizer.step()`` centers. Clipping that runs before ``step()`` sees the gradients as autograd
    left them, as in the authors' code. A closure (LBFGS; Lightning always passes one) is wrapped, so that the gradients
    it computes are centered too. A wrapper without step hooks is followed to the optimizer inside it, and so is SAM.

    Args:
        optimizer: holds parameters of the model; its other parameters are not centered. A list of optimizers, such as
            Muon and AdamW for different layers of one model, gives one handle for all of them. A parameter group with
            ``"centralize": False`` is not centered; ``"centralize": 0.5`` replaces the strength for its parameters.
        model: determines the layout (see `weight_layout`). Without it, the models that hold the optimizer's parameters
            are searched (see `WeightLayout.from_parameters`).
        placement: ``"gradient"``: the optimizer receives Φ(∂L/∂w), written into ``p.grad`` in place (algorithms 1 and
            2 of the paper). ``"regularized"``: it centers g + λw, the gradient with L2 weight decay, since it receives
            Φ(g) − λ·mean(w); this equals ``"gradient"`` without weight decay or with a decoupled one (AdamW).
            ``"update"``: w ← w + Φ(Δw), Δw the whole change that the step makes, weight decay included; ``p.grad`` is
            unchanged. For SGD with momentum this equals ``"regularized"``. Weight vectors that are not finite, such as
            those of a masked class, have no mean and are not shifted.
        layout: use this layout instead of the model's default: ``weight_layout(model, only="conv")``.
        strength: s of P_s = I − s·eeᵀ in place of P, from 0 (off) to 1 (GC): s·mean is subtracted. It may change while
            training, as ``handle.strength``; for CUDA graphs it may be a 0-dim tensor on the device.

    Returns:
        A `Handle` with ``.layout``, ``.strength``, ``.remove()``, ``.pause()``, ``.resume()``, ``.paused()``. Attaching
        again with the same settings returns the existing handle.

    Raises:
        ValueError: an unknown placement; a strength that is not between 0 and 1; both model and layout; none of the
            model's parameters is in the optimizer; nothing is left to center; a parameter is already centered with
            other settings; a differentiable optimizer; placement ``"update"`` for an optimizer with ``train()`` and
            ``eval()`` (Schedule-Free);
            placement ``"regularized"`` for the weight decay of an optimizer that is not derived from torch's.
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
    check_placement(placement)
    several = isinstance(optimizer, (list, tuple))
    given: list[Any] = [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not given:
        raise ValueError("the list of optimizers is empty: call centralize after they have been created")
    hooked = [hooked_optimizer(one) for one in given]
    for one, inner in zip(given, hooked, strict=True):
        if isinstance(getattr(inner, "targets", None), Targets):
            raise ValueError(f"gradcentral.{type(inner).__name__} already centers: pass placement= when you create it")
        refuse_unhookable(one, placement)
    optimizers = [*dict.fromkeys(hooked)]
    if placement == "regularized":
        for one in optimizers:
            l2_of(one)  # raises for weight decay of unknown kind
    groups = [group for one in optimizers for group in one.param_groups]
    handle = Handle(layout_to_use(model, layout, groups), placement, strength)
    attachments = [Attachment(handle, handle.layout, placement, strength) for _ in optimizers]
    pairs = [each.targets.attach(one, required=False).pairs for each, one in zip(attachments, optimizers, strict=True)]
    if not any(pairs):
        attachments[0].targets.attach(optimizers[0])
    if (existing := _attached_alike(optimizers, pairs, handle, several)) is not None:
        return existing
    for attachment, one in zip(attachments, optimizers, strict=True):
        attachment.register(one)
    handle._references = [weakref.ref(attachment) for attachment in attachments]
    names = ", ".join(type(one).__name__ for one in optimizers)
    log_attached(names, sum(map(len, pairs)), placement)
    return handle


def centralize_in_backward(
    model: nn.Module | None = None, *, layout: WeightLayout | None = None, strength: Strength = 1.0
) -> Handle:
    """Center each gradient when ``backward()`` computes it, by a hook per parameter, whatever optimizer uses it.

    For training without a step hook: DeepSpeed's ZeRO, optimizers that step in ``backward()``, optimizers that are not
    torch's. Since Φ is linear, the result is that of placement ``"gradient"`` with any accumulation, reduction and loss
    scaling; clipping sees the centered gradients. The gradients that ``torch.autograd.grad`` returns are centered too,
    and can be differentiated. Together with `centralize` on the same parameters nothing changes, since Φ(Φ(g)) = Φ(g).

    Lazy and frozen parameters are centered once they receive gradients. Added, removed, replaced and pruned layers are
    followed when the model's ``forward`` has returned; if it never runs, or only compiled, call this function again.

    Args:
        model: determines the layout (see `weight_layout`).
        layout: use this layout instead: ``weight_layout(model, only="conv")``.
        strength: see `centralize`.

    Returns:
        A `Handle`. Attaching again with the same settings returns the existing handle.

    Raises:
        ValueError: neither or both of model and layout; nothing to center; a parameter is already centered in backward
            with other settings; the model is sharded by FSDP2 or tensor parallelism; per-sample gradients (Opacus).

    Note:
        A copy of a model (``copy.deepcopy``, pickle) has no hooks, and warns if it is trained: call this function on
        the copy.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> handle = gradcentral.centralize_in_backward(model)
        >>> model(torch.randn(8, 4)).square().sum().backward()
        >>> bool(model.weight.grad.mean(1).abs().max() < 1e-6)
        True
    """
    handle = Handle(layout_to_use(model, layout), "gradient", strength)
    wanted = handle.layout
    on_model = hooks_of(wanted.names)
    for present in hooks_of(parameters_to_hook(wanted)):
        present.update()
        alike = dict(present.layout) == dict(wanted) and same_strength(present.strength, strength)
        if alike and isinstance(present.handle, Handle):
            return present.handle
        raise ValueError(
            f"parameters of this model are already centered in backward ({len(present.layout)} parameters; requested: "
            f"{len(wanted)}): remove that handle first: gradcentral.attached(model)[{on_model.index(present)}].remove()"
        )
    hooks = GradientHooks(handle, wanted, strength)
    hooks.register()
    handle._references = [weakref.ref(hooks)]
    log_attached("backward()", len(wanted), "gradient")
    return handle


class Handle:
    """Handle of attached centering: the layout in use, and methods to pause and remove it.

    To change settings other than the strength, remove the handle and attach again. A copy of a handle is attached to
    nothing.
    """

    def __init__(self, layout: WeightLayout, placement: str, strength: Strength = 1.0) -> None:
        self._layout = layout
        self._placement = placement
        # The optimizers keep the attachments alive, and these keep the handle alive. Weak references avoid a cycle, so
        # that the memory of a model is released as soon as its last reference is deleted.
        self._references: list[weakref.ref[Attachment | GradientHooks]] = []
        self._strength = checked_strength(strength)
        self._removed = False
        self._paused = False
        self._paused_blocks = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_references": []}

    @property
    def _attachments(self) -> list[Attachment | GradientHooks]:
        return [attachment for reference in self._references if (attachment := reference()) is not None]

    @property
    def layout(self) -> WeightLayout:
        """The layout in use."""
        return self._layout

    @property
    def placement(self) -> str:
        """``"gradient"``, ``"regularized"`` or ``"update"``."""
        return self._placement

    @property
    def strength(self) -> Strength:
        """s of P_s = I − s·eeᵀ, from 0 (off) to 1 (GC). Assign to it to change it from the next step on.

        Assigning to it raises a ValueError if it is not between 0 and 1. ``state_dict`` does not contain it.
        """
        return self._strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        self._strength = checked_strength(strength)
        for attachment in self._attachments:
            attachment.strength = strength

    def remove(self) -> None:
        """Stop centering for good. Calling this twice is harmless."""
        for attachment in self._attachments:
            attachment.remove()
        self._removed = True

    def pause(self) -> None:
        """Stop centering until `resume`. Calling this twice is harmless."""
        self._set_paused(True, self._paused_blocks)

    def resume(self) -> None:
        """Center again, from the next step or backward pass or from the end of the enclosing `paused` block."""
        self._set_paused(False, self._paused_blocks)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager: steps (or backward passes) inside the ``with`` block do not center."""
        self._set_paused(self._paused, self._paused_blocks + 1)
        try:
            yield
        finally:
            self._set_paused(self._paused, self._paused_blocks - 1)

    def _set_paused(self, paused: bool, blocks: int) -> None:
        self._paused, self._paused_blocks = paused, blocks
        for attachment in self._attachments:
            attachment.paused = paused or blocks > 0

    def __repr__(self) -> str:
        if self._removed or not any(attachment.active for attachment in self._attachments):
            state = "removed" if self._removed else "not attached"
        else:
            state = "paused" if self._paused or self._paused_blocks else "active"
            state += f" on {n} optimizers" if (n := len(self._attachments)) > 1 else ""
        return f"<gradcentral handle, {state}: placement {self.placement!r}, {self.layout.summary()}>"


def attached(optimizer: Optimizer | nn.Module) -> list[Handle]:
    """Return the handles on an optimizer, or those of `centralize_in_backward` on a model, that were not removed."""
    found: Sequence[Attachment | GradientHooks]
    if isinstance(optimizer, nn.Module) and not hasattr(optimizer, "param_groups"):
        found = hooks_of(optimizer.parameters())
    else:
        found = attachments_of(hooked_optimizer(optimizer))
    return [each.handle for each in found if isinstance(each.handle, Handle)]


def centering_of(optimizer: Optimizer) -> list[Targets]:
    """Return everything that centers in this optimizer's step: its own centering and what `centralize` has attached.

    The list is empty for a plain optimizer. All code that needs to find out what an optimizer centers calls this.
    """
    own = getattr(optimizer, "targets", None)
    of_handles = [attachment.targets for attachment in attachments_of(hooked_optimizer(optimizer))]
    return [own, *of_handles] if isinstance(own, Targets) else of_handles


def _attached_alike(
    optimizers: list[Optimizer], pairs: list[list[Pair]], handle: Handle, several: bool
) -> Handle | None:
    """Return the handle that centers the same parameters in the same way; raise if one centers them differently."""
    for index, (optimizer, wanted) in enumerate(zip(optimizers, pairs, strict=True)):
        for position, other in enumerate(attachments_of(optimizer)):
            present = dict(other.targets.current(optimizer).pairs)
            shared = next((p for p, _ in wanted if p in present), None)
            if shared is None:
                continue
            alike = present == dict(wanted) and other.targets.placement == handle.placement
            alike = alike and same_strength(other.targets.strength, handle.strength)
            if alike and isinstance(other.handle, Handle) and all(other.handle in attached(one) for one in optimizers):
                return other.handle
            name = f"optimizer[{index}]" if several else "optimizer"
            raise ValueError(
                f"{handle.layout.names[shared]} is already centered in this optimizer (placement "
                f"{other.targets.placement!r}, {len(present)} parameters, strength {other.targets.strength}; "
                "requested: "
                f"{handle.placement!r}, {len(wanted)}, {handle.strength}): remove that handle first: "
                f"gradcentral.attached({name})[{position}].remove()"
            )
    return None
