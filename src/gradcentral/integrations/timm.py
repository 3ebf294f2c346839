"""timm: names such as ``gcadamw`` for its optimizer factory. Importing this module registers them.

import gradcentral.integrations.timm
optimizer = timm.optim.create_optimizer_v2(model, opt="gcadamw", weight_decay=0.05, layer_decay=0.75)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import OptimInfo, list_optimizers
from timm.optim._optim_factory import default_registry
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gradcentral.attach import centralize
from gradcentral.layout import WeightLayout
from gradcentral.optim import SGD, Adam, AdamW

__all__ = ["register_optimizers"]

_PREFIX = "gc"
_FUSED: dict[object, Any] = {torch.optim.SGD: SGD, torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}


def register_optimizers() -> None:
    """Register ``"gc" + name`` for each name in timm's registry: ``gcsgd``, ``gcadamw``, ``gclion`` and so on.

    Importing this module does it. Call it again for optimizers that you register with timm afterwards.

    Each stands for the optimizer of the name without ``gc`` and its defaults, with GC: `gradcentral.SGD`, `Adam` and
    `AdamW` in place of torch's, and `gradcentral.centralize` for all others. They accept ``placement=``,
    ``strength=``, ``model=`` and ``layout=`` in addition; `gradcentral.attached` returns the handle. timm passes
    parameters without their model, so the layout is that of the model which holds them (see
    `gradcentral.WeightLayout.from_parameters`).

    ``"gc_adamw"`` is accepted too, and ``"lookahead_gcadamw"`` adds timm's Lookahead.

    Examples:
        >>> import timm.optim, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
        >>> optimizer = timm.optim.create_optimizer_v2(model, opt="gcadamw", weight_decay=0.05, placement="update")
        >>> type(optimizer), [group["weight_decay"] for group in optimizer.param_groups]
        (<class 'gradcentral.optim.adam.AdamW'>, [0.0, 0.05])
        >>> list(optimizer.layout.skipped)
        ['0.weight', '1.bias']
    """
    names = set(list_optimizers())
    for name in names:
        if _PREFIX + name not in names and name.removeprefix(_PREFIX) not in names - {name}:
            info = default_registry.get_optimizer_info(name)
            default_registry.register(
                dataclasses.replace(
                    info,
                    name=_PREFIX + name,
                    opt_class=_FUSED.get(info.opt_class) or _centralized(info),
                    description=f"{info.description}, with Gradient Centralization",
                )
            )


def _centralized(info: OptimInfo) -> Callable[..., Optimizer]:
    """Return a function that creates this optimizer and attaches Gradient Centralization to it."""

    def create(
        params: ParamsT,
        *,
        model: nn.Module | None = None,
        layout: WeightLayout | None = None,
        placement: str = "gradient",
        strength: float = 1.0,
        **kwargs: Any,
    ) -> Optimizer:
        optimizer: Optimizer = default_registry.get_optimizer_class(info, bind_defaults=False)(params, **kwargs)
        centralize(optimizer, model, placement, layout=layout, strength=strength)
        return optimizer

    return create


def _accept_separate_prefix() -> None:
    """Let timm's factory read ``"gc_adamw"`` as ``"gcadamw"``.

    timm only uses the part after the last underscore, so it would create AdamW without Gradient Centralization, and
    without an error.
    """
    original = default_registry.create_optimizer

    @functools.wraps(original)
    def create_optimizer(model_or_params: nn.Module | ParamsT, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
        *prefixes, name = opt.lower().split("_")
        if _PREFIX in prefixes:
            prefixes, name = [prefix for prefix in prefixes if prefix != _PREFIX], _PREFIX + name
        created: Optimizer = original(model_or_params, "_".join([*prefixes, name]), *args, **kwargs)
        return created

    vars(default_registry)["create_optimizer"] = create_optimizer


register_optimizers()
_accept_separate_prefix()
