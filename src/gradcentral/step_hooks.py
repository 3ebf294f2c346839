"""Step hooks: the optimizer whose hooks fire, the closure among a step's arguments, and what cannot be hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "HookedCall",
    "closure_of",
    "holds",
    "hooked_optimizer",
    "path_to_inner",
    "refuse_differentiable",
    "refuse_unhookable",
    "replace_closure",
    "wraps",
]

HookedCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a step, which a pre-hook may replace."""

# The attributes under which wrappers keep the optimizer that they wrap.
_INNER = ("base_optimizer", "optimizer", "original_optimizer", "_optimizer", "opt", "optim", "base")


def hooked_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer whose step hooks fire: itself, or one that it wraps.

    A wrapper without step hooks (of accelerate, Opacus, fastai, mmengine) is followed inward. A wrapper with step hooks
    is not, because it may change the gradients before the inner step, except to ``base_optimizer``, the name used by
    SAM: training usually calls SAM's ``first_step`` and ``second_step``, which bypass the hooks of its own step.

    Raises:
        TypeError: there is no ``torch.optim.Optimizer`` with step hooks.
    """
    found: list[Optimizer] = [current for _, current in _chain(optimizer) if _has_hooks(current)]
    if not found:
        remedy = (
            "for another kind of optimizer, call gradcentral.centralize_in_backward(model) once, or "
            "gradcentral.centralize_gradients(model) before each step"
        )
        if (inside := _optimizers_inside(optimizer)) is not None:
            remedy = f"attach to what it holds: gradcentral.centralize({inside}, model)"
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer with step hooks, not {type(optimizer).__name__}; {remedy}"
        )
    hooked = found[0]
    for base in found[1:]:
        if base is getattr(hooked, "base_optimizer", None) and _share_parameters(hooked, base):
            hooked = base
    return hooked


def path_to_inner(optimizer: Any) -> str | None:
    """Return the attributes that lead to the next optimizer with hooks inside this one, such as ``".optimizer"``."""
    return next((path for path, current in _chain(optimizer)[1:] if _has_hooks(current)), None)


def wraps(outer: Any, inner: Optimizer) -> bool:
    """Return whether an optimizer wraps another one."""
    return any(current is inner for _, current in _chain(outer)[1:])


def holds(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Return whether a parameter is in the groups that an optimizer has of its own, unlike most wrappers."""
    groups = vars(optimizer).get("param_groups", [])
    return any(p is parameter for group in groups for p in group["params"])


def refuse_unhookable(optimizer: Any, placement: str) -> None:
    """Refuse optimizers whose steps the hooks cannot center as the placement requires.

    Raises:
        ValueError: with the reason and a remedy.
    """
    chain = _chain(optimizer)
    for path, current in chain:
        if getattr(current, "_overlap_with_ddp", False):
            raise ValueError(
                "this ZeroRedundancyOptimizer steps inside DDP's communication, where no hook fires: create it with "
                "overlap_with_ddp=False"
            )
        if getattr(current, "base_optimizer", None) is not None and getattr(current, "decouple", False):
            raise ValueError(
                f"{type(current).__name__} changes the weights after the step of its base_optimizer, where no hook "
                "centers: create it with decouple=False"
            )
        if placement == "update" and _has_two_sequences(current):
            inner = next((at for at, one in chain if len(at) > len(path) and _has_hooks(one)), None)
            remedy = "" if inner is None else f"gradcentral.centralize(optimizer{inner}, model, 'update'), "
            raise ValueError(
                f"{type(current).__name__} keeps a second sequence of weights, which its eval() installs and placement "
                f"'update' does not center: use placement='gradient', {remedy}or a block around each call of step(), "
                "train() and eval(): with gradcentral.centered_update(model): …"
            )
    refuse_differentiable(hooked_optimizer(optimizer))


def refuse_differentiable(optimizer: Optimizer) -> None:
    """Refuse a differentiable step: the hooks center outside autograd's graph, so its derivative would lack Φ.

    Raises:
        ValueError: a parameter group has ``differentiable=True``.
    """
    if any(group.get("differentiable", False) for group in optimizer.param_groups):
        name = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in ("SGD", "Adam", "AdamW")), None)
        remedy = f"use gradcentral.{name or 'SGD'}(model, differentiable=True)" + ("" if name else ", Adam or AdamW")
        raise ValueError(
            f"differentiable=True: centralize works outside the graph, so the step's derivative would lack Φ; {remedy}"
        )


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the closure among a step hook's arguments: torch passes (optimizer, *arguments of step).

    Some optimizers take the loss, a number or a module instead, which is None here.
    """
    for candidate in (kwargs.get("closure"), *args[1:2]):
        if callable(candidate) and not isinstance(candidate, nn.Module):
            return cast("Callable[[], Any]", candidate)
    return None


def replace_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> HookedCall:
    """Return what a step pre-hook must return so that ``step`` receives this closure instead of its own."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def _chain(optimizer: Any) -> list[tuple[str, Any]]:
    """Return the optimizer and those that it wraps, from the outside in, with the attributes that lead to each."""
    chain: list[tuple[str, Any]] = [("", optimizer)]
    while len(chain) < 8:  # more than any nesting in use; wrappers may refer to each other
        path, current = chain[-1]
        inner = ((name, getattr(current, name, None)) for name in _INNER if _steps(current))
        found = next(((f"{path}.{name}", one) for name, one in inner if one is not current and _steps(one)), None)
        if found is None:
            break
        chain.append(found)
    return chain


def _optimizers_inside(optimizer: Any) -> str | None:
    """Return an expression for the optimizers that an object holds under a name not in ``_INNER``."""

    def is_followed(candidate: Any) -> bool:
        return any(_has_hooks(current) for _, current in _chain(candidate))

    for name, value in getattr(optimizer, "__dict__", {}).items():
        if is_followed(value):
            return f"optimizer.{name}"
        if isinstance(value, (list, tuple)) and value and all(map(is_followed, value)):
            return f"optimizer.{name}"
        if isinstance(value, dict) and value and all(map(is_followed, value.values())):
            return f"[*optimizer.{name}.values()]"
    return None


def _steps(candidate: Any) -> bool:
    return isinstance(candidate, Optimizer) or (
        callable(getattr(candidate, "step", None)) and not isinstance(candidate, type)
    )


def _has_hooks(candidate: Any) -> bool:
    return isinstance(candidate, Optimizer) and hasattr(candidate, "_optimizer_step_pre_hooks")


def _has_two_sequences(optimizer: Any) -> bool:
    """Return whether the weights that are evaluated differ from those that are trained (Schedule-Free)."""
    if isinstance(optimizer, nn.Module) or type(optimizer).__module__.startswith("accelerate."):
        return False  # accelerate's wrapper passes train() and eval() on to the optimizer inside, if it has them
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _share_parameters(one: Optimizer, other: Optimizer) -> bool:
    held = {p for group in one.param_groups for p in group["params"]}
    return any(p in held for group in other.param_groups for p in group["params"])
