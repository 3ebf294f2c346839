"""The targets of an optimizer's step: layout, placement, sharding and the optimizer's parameters, in one object.

Hooks, gradcentral's optimizers, Monitor and the arms of a comparison all use `Targets`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gradcentral.caller import level_of_caller
from gradcentral.distributed import Shards, shards_of
from gradcentral.groups import OPTION, Setting, check_keys, settings_of
from gradcentral.kernels.forms import same_objects
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.layout.structure import is_gathered
from gradcentral.local_shard import any_sharded
from gradcentral.projection import Pair, Strength, as_number, checked_strength
from gradcentral.strengths import Strengths

__all__ = [
    "PLACEMENTS",
    "Targets",
    "check_placement",
    "layout_to_use",
    "log_attached",
    "refuse_sparse",
    "shards_in_layout",
]

PLACEMENTS = ("gradient", "regularized", "update")


def check_placement(placement: str) -> None:
    """Refuse an unknown placement.

    Raises:
        ValueError: it is none of `PLACEMENTS`.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; choose from {', '.join(map(repr, PLACEMENTS))}")


def log_attached(what: str, parameters: int, placement: str) -> None:
    """Log that centering has been attached, at level INFO of the logger "gradcentral"."""
    logging.getLogger("gradcentral").info(
        "Gradient Centralization attached to %s: %d parameters, placement %r", what, parameters, placement
    )


class Targets:
    """The parameters that an optimizer's step centers, with their layout and placement.

    It follows changes during training: parameter groups added later, lazy parameters that have received their shape,
    layers added to the model, replaced, pruned or parametrized, layers that are frozen or unfrozen.

    Attributes:
        layout: the weight vectors of the model's parameters.
        placement: one of `PLACEMENTS`.
        paused: whether steps currently do not center.
        excluded: the parameters of groups with ``"centralize": False``.
    """

    def __init__(self, layout: WeightLayout, placement: str, strength: Strength = 1.0) -> None:
        check_placement(placement)
        self.strength = strength
        self._first_strength = self.strength  # which wrappers may have copied into the groups
        self.layout = layout
        self.placement = placement
        self.paused = False
        self.excluded: set[Tensor] = set()
        # The settings of the groups' parameters, and the values in the groups that they were read from.
        self._settings: dict[Tensor, Setting] = {}
        self._options: list[Setting | None] = []
        # The last result of `current` and the inputs it was computed from, which rarely change.
        self._shards = Shards([], [], [], {})
        self._parameters: list[Tensor] = []
        self._revision = -1
        self._trained: list[bool] | None = None
        self._not_in_model: set[Tensor] = set()
        # The centered parameters at attach time, until the first step has checked them.
        self._at_attach: list[tuple[str, Tensor, tuple[int, ...] | None]] = []
        # The model's parameters when `check` last compared them, and the revision of the layout then.
        self._known: dict[str, Tensor] = {}
        self._removed: set[Tensor] = set()
        self._checked = -1

    @property
    def strength(self) -> Strength:
        """s of P_s = I − s·eeᵀ, as it was set."""
        return self._strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        self._strength = checked_strength(strength)

    def strength_of(self, group: dict[str, Any]) -> Strength:
        """Return the strength of a group in this step, as `Strengths` describes it."""
        value = group.get(OPTION)
        if value is None or isinstance(value, bool):
            return _in_this_step(self._strength)
        return _in_this_step(value, '"centralize" of a parameter group')

    def strengths(self, optimizer: Optimizer) -> Strengths:
        """Return the strengths of the optimizer's parameters in this step."""
        if torch.compiler.is_compiling() and self.share_a_strength(optimizer):
            return self._read_strengths_eagerly(optimizer)
        return self._read_strengths(optimizer)

    def share_a_strength(self, optimizer: Optimizer) -> bool:
        """Return whether parameter groups, or a group and this object, have one tensor as their strength.

        Dynamo uses such a tensor for both, and does not guard that they are the same if it finds them in an optimizer.
        A graph of one tensor would therefore stay in use after they have become two.
        """
        options = (self._strength, *(group.get(OPTION) for group in optimizer.param_groups))
        tensors = [option for option in options if isinstance(option, Tensor)]
        return any(one is other for at, one in enumerate(tensors) for other in tensors[:at])

    def _read_strengths(self, optimizer: Optimizer) -> Strengths:
        default = _in_this_step(self._strength)
        own: dict[Tensor, Strength] = {}
        for group, option in zip(optimizer.param_groups, self._options, strict=True):
            if option is not None and not isinstance(option, bool):
                own.update(dict.fromkeys(group["params"], self.strength_of(group)))
        return Strengths(default, own)

    _read_strengths_eagerly = _disable_dynamo(_read_strengths)

    def current(self, optimizer: Optimizer, warn: bool = True) -> Shards:
        """Return the optimizer's centered parameters, each with the weight vectors that this rank holds.

        A parameter that is not in the model is skipped, with one warning if ``warn``.

        Raises:
            ValueError: a parameter is sharded in a way that cannot be centered (with its name and a remedy).
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.follow_groups(optimizer)
        if not self._is_current(parameters):
            self._look_up(optimizer, parameters, warn)
        return self._shards

    @_disable_dynamo  # torch.compile cannot trace the search of a layout, which is rarely needed
    def _look_up(self, optimizer: Optimizer, parameters: list[Tensor], warn: bool) -> None:
        self._read_settings(optimizer)
        new = self._find_new([p for p in parameters if p not in self.excluded])
        if new and warn:
            self._warn_about(optimizer, new)
        centered = [(p, self.layout.get(p)) for p in parameters if p not in self.excluded]
        pairs = [(p, vectors) for p, vectors in centered if vectors is not None]
        self._shards = shards_in_layout(self.layout, pairs)
        self._trained = _trained(pairs) if any_sharded(p for p, _ in pairs) else None
        self._parameters, self._revision = parameters, self.layout.revision

    def follow_groups(self, optimizer: Optimizer) -> None:
        """Read the option ``"centralize"`` of the parameter groups again if one of them has changed.

        Raises:
            ValueError: a group has a value, or another key, that cannot be used.
        """
        if not same_objects([group.get(OPTION) for group in optimizer.param_groups], self._options):
            self._read_settings(optimizer)

    def _read_settings(self, optimizer: Optimizer) -> None:
        used = {"placement": self.placement, "layout": self.layout, "strength": self._first_strength}
        check_keys(optimizer, used, own=getattr(optimizer, "targets", None) is self)
        self._settings = settings_of(optimizer, self._settings)
        self._options = [group.get(OPTION) for group in optimizer.param_groups]
        excluded = {p for p, setting in self._settings.items() if setting is False}
        if excluded != self.excluded:
            self.excluded = excluded
            self._revision = -1  # so that `current` looks up the parameters again

    def _is_current(self, parameters: list[Tensor]) -> bool:
        return (
            self.layout.revision == self._revision
            and same_objects(parameters, self._parameters)
            and not self.layout.pending
            and (self._trained is None or self._trained == _trained(self._shards.pairs))
        )

    def _find_new(self, parameters: list[Tensor]) -> list[Tensor]:
        """Look up parameters that are missing from the layout in the current model; return those not found there."""
        layout = self.layout
        new = [p for p in parameters if not layout.in_model(p) and p not in self._not_in_model]
        if not new and not layout.pending:
            return []
        layout.refresh()
        missing = [p for p in new if not layout.in_model(p)]
        self._not_in_model.update(missing)
        # `check` has reported removed layers; they deserve another warning only if they are used elsewhere.
        return [p for p in missing if p not in self._removed or p.grad is not None]

    def _warn_about(self, optimizer: Optimizer, missing: list[Tensor]) -> None:
        if getattr(optimizer, "targets", None) is self:
            remedy = (
                "create it with all models, model=torch.nn.ModuleList([model, their_model]), or leave them out with "
                '"centralize": False in their group'
            )
        else:
            remedy = "call gradcentral.centralize(optimizer, their_model) for them too"
        shapes = ", ".join(str(tuple(p.shape)) for p in missing)
        warnings.warn(
            f"the optimizer holds parameters that are not in the model, of shape {shapes}: they are not centered; "
            f"{remedy}",
            stacklevel=level_of_caller(),
        )

    def attach(self, optimizer: Optimizer, required: bool = True) -> Shards:
        """Return `current` for an optimizer that centering is being attached to, and remember its parameters.

        The optimizer may also hold parameters of other models, but if ``required``, something must be left to center.

        Raises:
            ValueError: none of the model's parameters is in the optimizer, or none of them is centered.
        """
        # gradcentral's own optimizers have one model; centralize may be called again for another one.
        own = getattr(optimizer, "targets", None) is self
        shards, layout = self.current(optimizer, warn=False), self.layout
        others = [p for p in self._parameters if p in self._not_in_model and p.ndim > 1]
        if own and others and shards.pairs:
            self._warn_about(optimizer, others)
        names = layout.names
        self._at_attach = [(names[p], p, vectors.shape) for p, vectors in shards.pairs]
        self._known = layout.current_parameters() or {}
        # With several ranks, one may hold only biases (ZeroRedundancyOptimizer, pipeline stages).
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if shards.pairs or layout.pending or not required:
            return shards
        held = {names[p] for p in self._parameters if layout.in_model(p)}
        if not held and (self._parameters or not several):
            flat = bool(self._parameters) and all(p.ndim <= 1 for p in self._parameters)
            instead = f"; flat partitions, such as DeepSpeed's ZeRO, cannot be centered: {_INSTEAD_OF_FLAT}"
            raise ValueError(
                "none of the model's parameters is in the optimizer: pass the model whose parameters it was created "
                "with (create the optimizer after moving, wrapping or sharding the model)" + (instead if flat else "")
            )
        if not several:
            skipped = {**layout.skipped, **{names[p]: "excluded by its group" for p in self.excluded if p in names}}
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items() if name in held)
            raise ValueError(
                f"nothing is left to center in this optimizer ({reasons}): leave it as it is, or pass all optimizers "
                f"of the model together, gradcentral.centralize([optimizer, ...], model)\n{layout.to_paste()}".rstrip()
            )
        return shards

    def check(self, optimizer: Optimizer) -> None:
        """Follow changes of the groups and the model, and check that the optimizer holds the parameters it uses.

        The full check runs at the first step, where lost parameters raise an error, and after changes of the model,
        where they cause a warning: another optimizer may hold the new ones.

        Raises:
            RuntimeError: sharding, flattening or rebuilding the model has left the optimizer with parameters that the
                model no longer uses, or has changed their shapes.
            ValueError: the model has been wrapped in FSDP1; as `follow_groups`.
        """
        if torch.compiler.is_compiling():
            return
        self.follow_groups(optimizer)
        self.layout.follow()
        if not self._at_attach and self._checked == self.layout.revision:
            return
        in_model = self.layout.current_parameters()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if in_model is not None and held and held <= set(in_model.values()):
            # The optimizer has received the model's new parameters (accelerate's FSDP2, a functional step).
            self._at_attach = [found for found in self._at_attach if found[1] in held]
        elif self._at_attach and not any(p in held for _, p, _ in self._at_attach):
            raise RuntimeError(
                "the optimizer no longer holds any of the parameters to center: they were replaced after Gradient "
                f"Centralization was attached, as DeepSpeed's ZeRO does; {_INSTEAD_OF_FLAT}"
            )
        for name, p, shape in self._at_attach:
            if p.shape != shape:
                raise RuntimeError(
                    f"{name} had shape {shape} when Gradient Centralization was attached and has {tuple(p.shape)} now: "
                    f"attach after everything that reshapes parameters; {_KEEPS_SHAPES}"
                )
        if in_model is not None:
            self._check_in_model(in_model, held)
            self._known = in_model
        self._at_attach = []
        self._checked = self.layout.revision

    def _check_in_model(self, in_model: dict[str, Tensor], held: set[Tensor]) -> None:
        """Refuse, or after the first step report, parameters that were replaced by some that the optimizer lacks."""
        present, known = {*in_model.values()}, {*self._known.values()}
        lost = {
            name: p
            for name, p in self._known.items()
            if p in held and p not in present and not is_gathered(p, in_model.get(name))
        }
        new = {
            name: p
            for name, p in in_model.items()
            if p.requires_grad and p not in held and p not in known and not is_gathered(self._known.get(name, p), p)
        }
        self._removed.update(lost.values())
        # A tied parameter may have been replaced under one of its names only.
        kept = {p for name, p in self._known.items() if in_model.get(name) is p}
        lost |= {name: p for name, p in self._known.items() if name in new and p in held and p in kept}
        remaining = [p for p in present if p in held]
        # Unless nothing remains, a layer that was removed from the model without a replacement may stay.
        replaced = [
            name
            for name in lost
            if not remaining or any(other == name or other.startswith(_layer(name)) for other in new)
        ]
        if not replaced and new and remaining and not any(p.requires_grad for p in remaining):
            warnings.warn(
                f"the optimizer holds frozen parameters only, and lacks the trained parameters {_some(new)}, which "
                "were added to the model later: this step trains nothing; create the optimizer, and attach Gradient "
                "Centralization, after get_peft_model or anything else that adds parameters",
                stacklevel=level_of_caller(),
            )
        if not replaced:
            return
        problem = (
            f"the optimizer holds parameters that the model no longer uses ({_some(replaced)}), but not those in their "
            f"place ({_some(new) or 'none is trained'}), so this step does not train them"
        )
        if self._at_attach:
            raise RuntimeError(
                f"{problem}: create the optimizer, and attach Gradient Centralization, after fully_shard, "
                "parallelize_module, weight_norm or anything else that replaces parameters"
            )
        warnings.warn(
            f"{problem}: add them with optimizer.add_param_group({{'params': new_parameters}}), or ignore this if "
            "another optimizer holds them",
            stacklevel=level_of_caller(),
        )


_KEEPS_SHAPES = (
    "use torch.distributed.fsdp.fully_shard (FSDP2) or ZeroRedundancyOptimizer, which keep the shapes of parameters"
)
_INSTEAD_OF_FLAT = f"{_KEEPS_SHAPES}, or call gradcentral.centralize_in_backward(model) before deepspeed.initialize"


def _in_this_step(strength: Strength, name: str = "strength") -> Strength:
    """Return a strength as the kernels take it. Only that of a tensor may have changed since it was checked."""
    return as_number(checked_strength(strength, name)) if isinstance(strength, Tensor) else strength


def layout_to_use(model: nn.Module | None, layout: WeightLayout | None, params: ParamsT | None = None) -> WeightLayout:
    """Return the layout of a call that takes a model or a layout; without both, that of the models of ``params``.

    Raises:
        TypeError: ``layout`` is not a `WeightLayout`.
        ValueError: neither of the three, or both model and layout are given.
    """
    if layout is not None and not isinstance(layout, WeightLayout):
        raise TypeError(f"layout must be a WeightLayout (weight_layout(model)), not {type(layout).__name__}")
    if model is not None and layout is not None:
        raise ValueError("pass model or layout, not both: layout=weight_layout(model, ...) sets options of the layout")
    if layout is not None:
        return layout
    if model is not None:
        return weight_layout(model)
    if params is not None:
        return WeightLayout.from_parameters(params)
    raise ValueError(
        "pass model=, whose layers determine the weight vectors; without a model, "
        "layout=gradcentral.WeightLayout.from_parameters(params) finds the layers, and from_shapes(params) applies the "
        "shape rule"
    )


def shards_in_layout(layout: WeightLayout, pairs: list[Pair]) -> Shards:
    """Return the shards of some of a layout's parameters, all of which are whole if none is a DTensor."""
    if any_sharded(parameter for parameter, _ in pairs):
        return shards_of(pairs, layout.names)
    return Shards(pairs, pairs, [], {})


def refuse_sparse(gradient: Tensor, parameter: Tensor, layout: WeightLayout) -> None:
    """Refuse a gradient that cannot be centered without filling in its zeros.

    Raises:
        ValueError: the gradient is sparse (with its parameter's name and a remedy).
    """
    if gradient.layout == torch.strided:
        return
    name = layout.names[parameter]
    remedy = f"skip it with layout=weight_layout(model, exclude=[{name!r}])"
    if layout.is_guessed(parameter):
        name = f"parameter {name} of shape {tuple(parameter.shape)}"
        remedy = "pass model=, so that embeddings are recognized"
    raise ValueError(
        f"{name} has a sparse gradient, and centering would fill in its zeros: {remedy}, or make the gradient dense "
        "(sparse=False)"
    )


def _trained(pairs: list[Pair]) -> list[bool]:
    return [parameter.requires_grad for parameter, _ in pairs]


def _layer(name: str) -> str:
    """Return the prefix of the names of all parameters of a parameter's layer."""
    layer = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    return f"{layer}." if layer else ""


def _some(names: Collection[str]) -> str:
    return ", ".join([*names][:3]) + (", …" if len(names) > 3 else "")
