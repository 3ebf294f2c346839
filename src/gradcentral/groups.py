"""The option ``"centralize"`` of parameter groups: False leaves the parameters of a group out."""

from __future__ import annotations

from collections.abc import Mapping, Set
from difflib import get_close_matches

from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.layout import WeightLayout

__all__ = ["OPTION", "check_keys", "excluded_parameters"]

OPTION = "centralize"
# With values of these types, since other libraries may use the same keys for something else.
_OF_THE_WHOLE_OPTIMIZER: dict[str, type | tuple[type, ...]] = {
    "placement": str,
    "strength": (int, float, Tensor),
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
            if get_close_matches(key, [OPTION], cutoff=0.85):
                raise ValueError(f'{problem}, which has no effect: use "centralize": False to leave the group out')


def _same(one: object, other: object) -> bool:
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def excluded_parameters(optimizer: Optimizer, before: Set[Tensor] = frozenset()) -> set[Tensor]:
    """Return the parameters of groups with ``"centralize": False``.

    A group without the key keeps its setting, because loading a checkpoint removes keys that it does not contain.

    Args:
        optimizer: the optimizer.
        before: the parameters that were excluded before.

    Raises:
        ValueError: a value is neither True nor False.
    """
    excluded: set[Tensor] = set()
    for index, group in enumerate(optimizer.param_groups):
        value = group.get(OPTION)
        if value is None:
            excluded.update(p for p in group["params"] if p in before)
        elif value is False:
            excluded.update(group["params"])
        elif value is not True:
            raise ValueError(f'parameter group {index}: "centralize" must be True or False, not {value!r}')
    return excluded
