"""Centering of any change of the weights: `centered_update` around it, `center_update_` between two states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradcentral.distributed import shards_of
from gradcentral.gradients import remembered_layout
from gradcentral.kernels import Centering
from gradcentral.layout import WeightLayout
from gradcentral.layout.rules import LeaveAlone, not_centerable
from gradcentral.layout.structure import is_gathered
from gradcentral.local_shard import is_sharded, local, overlaps_itself
from gradcentral.projection import Strength, as_number, checked_strength, restore_means_, unit_means
from gradcentral.strengths import Strengths
from gradcentral.targets import layout_to_use, shards_in_layout
from gradcentral.weight_vectors import WeightVectors, as_vectors

__all__ = ["center_update_", "centered_update", "check_usable"]

_State = TypeVar("_State", Tensor, Mapping[str, Tensor])


@contextmanager
def centered_update(
    model: nn.Module | None = None, layout: WeightLayout | None = None, strength: Strength = 1.0
) -> Iterator[None]:
    """Center every change of the weights inside the ``with`` block: w ← w + Φ(Δw), as placement ``"update"`` does.

    Δw is the whole change between the start and the end of the block, whatever makes it: an optimizer without step
    hooks, an average, a merge, an assignment. The mean of every weight vector is then what it was at the start, up to
    rounding. Weight vectors that are not finite are not shifted, and neither are frozen parameters. Blocks may be
    nested, and the function may also be used as a decorator.

    If the block raises, the weights stay as it left them, and the exception is passed on.

    Args:
        model: its layout is determined at the first call and kept until its parameters change.
        layout: use this layout instead.
        strength: s of P_s = I − s·eeᵀ in place of P, from 0 (off) to 1 (GC): the mean of a weight vector moves by
            (1 − s) times as much as without the block.

    Raises:
        ValueError: neither model nor layout; nothing to center; a lazy parameter has no values yet; the layout belongs
            to another model; all parameters are frozen; a strength that is not between 0 and 1.
        RuntimeError: at the end of the block, if it has replaced a parameter or changed its shape, type or device. No
            mean has been restored then.

    Note:
        If weight vectors are split between ranks (DTensors), the end of the block is a collective.

    Examples:
        >>> import torch, gradcentral
        >>> model = torch.nn.Linear(4, 2)
        >>> before = model.weight.detach().mean(1)
        >>> with gradcentral.centered_update(model), torch.no_grad():
        ...     _ = model.weight.mul_(0.9).add_(1.0)
        >>> bool((model.weight.mean(1) - before).abs().max() < 1e-6)
        True
    """
    strength = as_number(checked_strength(strength))
    layout = _layout_of(model, layout)
    trained = [(p, vectors) for p, vectors in layout.items() if p.requires_grad]
    if not trained:
        raise ValueError(
            "all parameters to center are frozen (requires_grad=False), and centered_update leaves them alone: center "
            "the change between two states, gradcentral.center_update_(model.state_dict(), old, layout), or unfreeze "
            "them, model.requires_grad_()"
        )
    shards, centering = shards_in_layout(layout, trained), Centering()
    with torch.no_grad():
        tensors = [(local(p), vectors) for p, vectors in shards.whole]
        means, split_sums = centering.means(tensors), shards.split_sums()
    centered = [p for p, _ in shards.whole] + [split.parameter for split in shards.split]
    forms = [_Form.of(p) for p in centered]
    strides = [tensor.stride() for tensor, _ in tensors]
    del tensors  # they would keep the memory of a parameter whose data the block replaces

    yield

    names = layout.names
    _check_not_replaced(model, layout, trained, names)
    for p, form in zip(centered, forms, strict=True):
        if (now := _Form.of(p)) != form:
            raise RuntimeError(
                f"{names[p]} changed inside centered_update from {form} to {now}, so the means cannot be restored: "
                "convert the model before the block"
            )
    with torch.no_grad():
        # The order of the means depends on the strides, which an assignment to p.data may have changed.
        restored = [_with_stride(local(p), own) for (p, _), own in zip(shards.whole, strides, strict=True)]
        pairs = [(w, vectors) for w, (_, vectors) in zip(restored, shards.whole, strict=True)]
        centering.restore_(pairs, means, strength)
        for w, (p, _) in zip(restored, shards.whole, strict=True):
            if w is not local(p):
                local(p).copy_(w)
        shards.restore_split_means_(split_sums, Strengths(strength, {}))


def center_update_(
    new: _State,
    old: Tensor | Mapping[str, Tensor],
    layout: WeightLayout | WeightVectors | str,
    strength: Strength = 1.0,
) -> _State:
    """Center the change between two states in place: new ← old + Φ(new − old), as placement ``"update"`` does.

    It serves where there is no model, or none that changes: averages of clients, merged checkpoints, weights averaged
    outside the model. The mean of every weight vector of ``new`` is then that of ``old``, up to rounding. ``old`` is
    unchanged, and so are the entries of ``new`` that the layout does not center, such as biases and buffers. Weight
    vectors that are not finite are not shifted. Both states may differ in dtype and device.

    Args:
        new: a state dict, with all or some of the layout's parameters; or one tensor.
        old: the state before the change, of the same kind: a copy, since ``model.state_dict()`` refers to the weights.
        layout: `weight_layout` of the model, for state dicts; for tensors the `WeightVectors`, or a pattern such as
            ``"o [i]"``.
        strength: s of P_s = I − s·eeᵀ in place of P, from 0 (off) to 1 (GC).

    Returns:
        ``new``.

    Raises:
        TypeError: a state dict with weight vectors, or a tensor with a layout.
        ValueError: names, shapes or types that do not fit (with the name); ``new`` and ``old`` share their memory; a
            strength that is not between 0 and 1.

    Examples:
        >>> import torch, gradcentral
        >>> old = torch.tensor([[1.0, 2.0, 3.0]])
        >>> gradcentral.center_update_(torch.tensor([[5.0, 2.0, 5.0]]), old, "o [i]")
        tensor([[3., 0., 3.]])
    """
    strength = as_number(checked_strength(strength))
    changes = _changes(new, old, layout)
    _check_memory(changes)
    distinct = {_memory(change.new): change for change in changes}  # tied weights once
    by_new = {change.new: change for change in distinct.values()}
    with torch.no_grad():
        olds = {p: _placed(change.old, p) for p, change in by_new.items()}
        pairs = [(p, change.vectors) for p, change in by_new.items()]
        shards = shards_of(pairs, {p: change.name for p, change in by_new.items()}, frozen=True)
        old_sums = [split.sums(olds[split.parameter]) for split in shards.split]
        for p, vectors in shards.whole:
            restore_means_(local(p), unit_means(olds[p], vectors), vectors, strength)
        shards.restore_split_means_(old_sums, Strengths(strength, {}))
    return new


def check_usable(layout: WeightLayout, model: nn.Module | None = None) -> None:
    """Refuse a layout of weights that have no values yet, without any to center, or of another model.

    Raises:
        ValueError: with the reason and a remedy.
    """
    if layout.pending:
        raise ValueError("model: a lazy parameter has no values yet: run one forward pass of the model first")
    if not layout:
        raise ValueError(f"nothing to center: {layout.summary()}\n{layout.to_paste()}".rstrip())
    own = None if model is None else {*model.parameters()}
    for parameter in layout:
        if own is not None and parameter not in own:
            name = layout.names[parameter]
            raise ValueError(f"layout: {name} is not a parameter of the model: pass weight_layout(model)")


class _Form(NamedTuple):
    """The properties of a parameter that the means before and after a block must share."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> _Form:
        held = local(parameter)
        return cls(held.shape, held.dtype, held.device)

    def __str__(self) -> str:
        return f"shape {tuple(self.shape)}, {self.dtype} on {self.device}"


class _Change(NamedTuple):
    """One tensor before and after a change."""

    name: str
    new: Tensor
    old: Tensor
    vectors: WeightVectors


def _layout_of(model: nn.Module | None, layout: WeightLayout | None) -> WeightLayout:
    if model is not None and layout is None:
        layout = remembered_layout(model)
    else:
        layout = layout_to_use(None, layout)
        if layout.pending:
            layout.refresh()
    layout.follow()
    check_usable(layout, model)
    return layout


def _check_not_replaced(
    model: nn.Module | None, layout: WeightLayout, trained: list[Any], names: Mapping[Tensor, str]
) -> None:
    """Raise if a parameter is no longer in the model, unless FSDP2 has put its gathered form there."""
    now: Mapping[str, Tensor] | None
    now = layout.current_parameters() if model is None else dict(model.named_parameters(remove_duplicate=False))
    if now is None:
        return
    present = {*now.values()}
    for p, _ in trained:
        if p not in present and not is_gathered(p, now.get(names[p])):
            raise RuntimeError(
                f"{names[p]} was replaced or removed inside centered_update, so its change cannot be centered: write "
                "the new values into the parameter, as model.load_state_dict(state) does without assign=True, or "
                "center the change between two states, gradcentral.center_update_(new, old, layout)"
            )


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the tensor itself if it has these strides, else a copy that has them."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _changes(new: object, old: object, layout: object) -> list[_Change]:
    """Return the tensors to center, checked; nothing has been changed if one of them does not fit."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        if not isinstance(layout, (str, WeightVectors)):
            raise TypeError(f"for tensors, pass a pattern such as 'o [i]' or WeightVectors, not {_kind(layout)}")
        changes = [_Change("new", new, old, as_vectors(layout, new.shape))]
    elif isinstance(new, Mapping) and isinstance(old, Mapping):
        if not isinstance(layout, WeightLayout):
            raise TypeError(f"for state dicts, pass the layout, weight_layout(model), not {_kind(layout)}")
        changes = [*_changes_of_states(new, old, layout)]
    else:
        raise TypeError(f"pass two state dicts or two tensors, not {_kind(new)} and {_kind(old)}")
    for change in changes:
        _check(change)
    return changes


def _changes_of_states(new: Mapping[str, Any], old: Mapping[str, Any], layout: WeightLayout) -> Iterator[_Change]:
    if layout.pending:
        layout.refresh()
    layout.follow()
    check_usable(layout)
    centered = [(name, e.vectors) for e in layout.entries if e.vectors for name in (e.name, *e.aliases)]
    if not any(name in new for name, _ in centered):
        raise ValueError(
            f"new has none of the layout's parameters ({centered[0][0]}, …), but {', '.join([*new][:3]) or 'nothing'}: "
            "pass the state_dict of the model that the layout was created for"
        )
    for name, vectors in centered:
        if name in new:
            if name not in old:
                raise ValueError(f"{name} is in new, but not in old: pass the whole state before the change")
            yield _Change(name, new[name], old[name], vectors)


def _check(change: _Change) -> None:
    name, new, old, vectors = change
    for state, tensor in (("new", new), ("old", old)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} in {state} must be a tensor, not {_kind(tensor)}")
        if isinstance(reason := not_centerable(tensor), LeaveAlone):
            raise ValueError(f"{name} in {state} cannot be centered: {reason.reason}")
    if new.shape != old.shape:
        raise ValueError(f"{name} has shape {tuple(new.shape)} in new, but {tuple(old.shape)} in old")
    if vectors.shape is not None and vectors.shape != tuple(new.shape):
        raise ValueError(f"{name} has shape {tuple(new.shape)} in new, but {vectors.shape} in the layout")
    if old.is_complex() and not new.is_complex():
        raise ValueError(f"{name} is complex in old, but not in new")
    if is_sharded(new) != is_sharded(old):
        kinds = ("a DTensor", "a plain tensor")
        raise ValueError(
            f"{name} is {kinds[not is_sharded(new)]} in new, but {kinds[is_sharded(new)]} in old: convert one of them "
            "with distribute_tensor or full_tensor"
        )
    if overlaps_itself(local(new)):
        raise ValueError(f"{name}: several elements of new share memory, so they cannot be written: clone it")


def _check_memory(changes: list[_Change]) -> None:
    if all(_memory(change.new) == _memory(change.old) for change in changes):
        raise ValueError(
            "new and old share their memory, so there is no change to center: copy the old state before it changes, "
            "as in old = copy.deepcopy(model.state_dict()), since state_dict() refers to the weights themselves"
        )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Identify the elements that a tensor refers to; unlike pointers, also those of an empty shard."""
    held = local(tensor)
    return held.untyped_storage()._cdata, held.storage_offset(), held.shape, held.stride()


def _placed(old: Tensor, new: Tensor) -> Tensor:
    """Return the local shard of the old tensor, placed and on the device like that of the new one."""
    if is_sharded(old) and is_sharded(new):
        old = old.redistribute(new.device_mesh, new.placements)
    return local(old).to(local(new).device)


def _kind(value: object) -> str:
    return type(value).__name__
