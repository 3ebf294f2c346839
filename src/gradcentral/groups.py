"""The option ``"centralize"`` of parameter groups: False leaves a group out, and a number is its strength."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.layout import WeightLayout
from gradcentral.projection import Strength, checked_strength
from gradcentral.strengths import same_strength

__all__ = ["OPTION", "Setting", "check_keys", "settings_of"]

OPTION = "centralize"

Setting = bool | Strength
"""True: with the strength of the optimizer or handle; False: left out; a number or a 0-dim tensor: this strength."""

# With values of these types, since other libraries may use the same keys for something else.
_OF_THE_WHOLE_OPTIMIZER: dict[str, type | tuple[type, ...]] = {
    "placement": str,
    "layout": WeightLayout,
    "model": nn.Module,
}


def check_keys(optimizer: Optimizer, settings: Mapping[str, object], *, own: bool) -> None:
    """Refuse keys of parameter groups that look like an option of gradcentral and would have no effect.

    Args:
        optimizer: the optimizer.
        settings: the placement, the strength and the layout in use; keys with these values are harmless. Wrappers (SAM,
            ``ZeroRedundancyOptimizer``) copy the arguments of the optimizer that they create into its groups.
        own: whether it is gradcentral's own optimizer, whose ``model=`` they copy too.

    Raises:
        ValueError: with the key and a remedy.
    """
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        for key, value in group.items():
            if key in optimizer.defaults or key == OPTION or (key in settings and _same(value, settings[key])):
                continue
            if key == "model" and own and all(other.get(key) is value for other in groups):
                continue
            problem = f"parameter group {index} has the key {key!r}"
            if isinstance(value, _OF_THE_WHOLE_OPTIMIZER.get(key, ())):
                raise ValueError(
                    f"{problem}, but it applies to a whole optimizer: create one optimizer per {key}; "
                    '"centralize": False leaves a group out'
                )
            if key == "strength" and _is_number(value):
                raise ValueError(f'{problem}, which has no effect: use "centralize": {value!r}')
            if get_close_matches(key, [OPTION], cutoff=0.85):
                meant = value if _is_number(value) else False
                raise ValueError(
                    f'{problem}, which has no effect: use "centralize": {meant!r}; False leaves a group out, and a '
                    "number is its strength"
                )


def _same(one: object, other: object) -> bool:
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)


def settings_of(optimizer: Optimizer, before: Mapping[Tensor, Setting]) -> dict[Tensor, Setting]:
    """Return the setting of each parameter whose group has one.

    A group without the key keeps its setting, because loading a checkpoint removes keys that it does not contain: the
    key is written into the group again.

    Args:
        optimizer: the optimizer.
        before: the settings that the parameters had before.

    Raises:
        ValueError: a value is not a setting; a group without the key has parameters whose settings were different.
    """
    found: dict[Tensor, Setting] = {}
    for index, group in enumerate(optimizer.param_groups):
        value = group.get(OPTION)
        if value is None and before:
            value = _kept(index, group, before)
            if value is not None:
                group[OPTION] = value
        if value is None:
            continue
        if not isinstance(value, bool):
            _check_strength(value, f'parameter group {index}: "centralize"')
        found.update(dict.fromkeys(group["params"], value))
    return found


def _check_strength(value: Any, name: str) -> None:
    if not _is_number(value):
        raise ValueError(f"{name} must be True, False or a strength between 0 and 1, not {value!r}")
    checked_strength(value, name)


def _kept(index: int, group: dict[str, Any], before: Mapping[Tensor, Setting]) -> Setting | None:
    """Return the setting that all parameters of a group had before, or None if they had none."""
    settings = [before.get(p) for p in group["params"]]
    if all(setting is None for setting in settings):
        return None
    first = settings[0]
    if not all(_same_setting(first, setting) for setting in settings):
        raise ValueError(
            f'parameter group {index} has no "centralize", and its parameters had different values of it before: add '
            '"centralize": True, False or a strength'
        )
    return first


def _same_setting(one: Setting | None, other: Setting | None) -> bool:
    if one is None or other is None or isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return same_strength(one, other)
