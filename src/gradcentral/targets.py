"""The targets of an optimizer's step: layout, placement, sharding and the optimizer's parameters, in one object.

Hooks, gradcentral's optimizers, Monitor and the arms of a comparison all use `Targets`.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.distributed import Shards, shards_of
from gradcentral.groups import OPTION, check_keys, excluded_parameters
from gradcentral.kernels.forms import same_objects
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.local_shard import any_sharded
from gradcentral.projection import Pair

__all__ = ["PLACEMENTS", "Targets", "check_placement", "layout_to_use", "refuse_sparse", "shards_in_layout"]

PLACEMENTS = ("gradient", "update")


def check_placement(placement: str) -> None:
    """Refuse an unknown placement.

    Raises:
        ValueError: it is none of `PLACEMENTS`.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; choose from {', '.join(map(repr, PLACEMENTS))}")


class Targets:
    """The parameters that an optimizer's step centers, with their layout and placement.

    It follows changes during training: parameter groups added later, lazy parameters that have received their shape,
    layers added to the model, layers that are frozen or unfrozen.

    Attributes:
        layout: the weight vectors of the model's parameters.
        placement: one of `PLACEMENTS`.
        paused: whether steps currently do not center.
        excluded: the parameters of groups with ``"centralize": False``.
    """

    def __init__(self, layout: WeightLayout, placement: str) -> None:
        check_placement(placement)
        self.layout = layout
        self.placement = placement
        self.paused = False
        self.excluded: set[Tensor] = set()
        self._options: list[bool | None] = []
        # The last result of `current` and the inputs it was computed from, which rarely change.
        self._shards = Shards([], [], [], {})
        self._parameters: list[Tensor] = []
        self._revision = -1
        self._trained: list[bool] | None = None
        self._not_in_model: set[Tensor] = set()
        # The parameters at attach time, checked for replacement at the first step.
        self._at_attach: list[tuple[str, Tensor, tuple[int, ...] | None]] = []

    def current(self, optimizer: Optimizer, warn: bool = True) -> Shards:
        """Return the optimizer's centered parameters, each with the weight vectors that this rank holds.

        A parameter that is not in the model is skipped, with one warning if ``warn``.

        Raises:
            ValueError: a parameter is sharded in a way that cannot be centered (with its name and a remedy).
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        options = [group.get(OPTION) for group in optimizer.param_groups]
        if options != self._options or not self._is_current(parameters):
            own = getattr(optimizer, "targets", None) is self
            check_keys(optimizer, {"placement": self.placement, "layout": self.layout}, own=own)
            self.excluded = excluded_parameters(optimizer, self.excluded)
            self._options = options
            new = self._find_new([p for p in parameters if p not in self.excluded])
            if new and warn:
                self._warn_about(optimizer, new)
            centered = [(p, self.layout.get(p)) for p in parameters if p not in self.excluded]
            pairs = [(p, vectors) for p, vectors in centered if vectors is not None]
            self._shards = shards_in_layout(self.layout, pairs)
            self._trained = _trained(pairs) if any_sharded(p for p, _ in pairs) else None
            self._parameters, self._revision = parameters, self.layout.revision
        return self._shards

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
        return missing

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
            stacklevel=6,
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
        # With several ranks, one may hold only biases (ZeroRedundancyOptimizer, pipeline stages).
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if shards.pairs or layout.pending or not required:
            return shards
        held = {names[p] for p in self._parameters if layout.in_model(p)}
        if not held and (self._parameters or not several):
            flat = self._parameters and all(p.ndim <= 1 for p in self._parameters)
            raise ValueError(
                "none of the model's parameters is in the optimizer: pass the model whose parameters it was created "
                "with (create the optimizer after moving, wrapping or sharding the model)"
                + (f"; flat partitions, such as DeepSpeed's ZeRO, cannot be centered: {_KEEPS_SHAPES}" if flat else "")
            )
        if not several:
            skipped = {**layout.skipped, **{names[p]: "excluded by its group" for p in self.excluded if p in names}}
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items() if name in held)
            raise ValueError(
                f"nothing is left to center in this optimizer ({reasons}): leave it as it is, or pass all optimizers "
                "of the model together, gradcentral.centralize([optimizer, ...], model)"
            )
        return shards

    def check(self, optimizer: Optimizer) -> None:
        """Check at the first step that the parameters present at attach time have not been replaced since.

        Raises:
            RuntimeError: sharding, flattening or rebuilding the model has left the optimizer with parameters that the
                model no longer uses, or has changed their shapes.
            ValueError: the model has been wrapped in FSDP1.
        """
        if not self._at_attach or torch.compiler.is_compiling():
            return
        in_model = self.layout.current_parameters()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if in_model is not None and held and held <= set(in_model.values()):
            # The optimizer has received the model's new parameters (accelerate's FSDP2, a functional step).
            self._at_attach = [found for found in self._at_attach if found[1] in held]
        elif not any(p in held for _, p, _ in self._at_attach):
            raise RuntimeError(
                "the optimizer no longer holds any of the parameters to center: they were replaced after Gradient "
                f"Centralization was attached, as DeepSpeed's ZeRO does; {_KEEPS_SHAPES}"
            )
        for name, p, shape in self._at_attach:
            if p.shape != shape:
                raise RuntimeError(
                    f"{name} had shape {shape} when Gradient Centralization was attached and has {tuple(p.shape)} now: "
                    f"attach after everything that reshapes parameters; {_KEEPS_SHAPES}"
                )
        if in_model is not None:
            self._check_in_model(in_model, held)
        self._at_attach = []

    def _check_in_model(self, in_model: dict[str, Tensor], held: set[Tensor]) -> None:
        present = set(in_model.values())
        replaced = [
            name
            for name, p, _ in self._at_attach
            # A parameter under another name is still trained, and so is a replacement that the optimizer holds.
            if p not in present and _is_replaced(p, in_model.get(name)) and in_model.get(name) not in held
        ]
        # A layer that was removed from the model without a replacement may stay in the optimizer.
        if replaced and (len(replaced) == len(self._at_attach) or any(name in in_model for name in replaced)):
            raise RuntimeError(
                "the optimizer holds parameters that the model no longer uses, so this step would train nothing "
                f"({', '.join(replaced[:3])}{', …' if len(replaced) > 3 else ''}): create the optimizer, and attach "
                "Gradient Centralization, after fully_shard, parallelize_module or anything else that replaces them"
            )


_KEEPS_SHAPES = (
    "use torch.distributed.fsdp.fully_shard (FSDP2) or ZeroRedundancyOptimizer, which keep the shapes of parameters"
)


def layout_to_use(model: nn.Module | None, layout: WeightLayout | None) -> WeightLayout:
    """Return the layout of a call that takes a model or a layout.

    Raises:
        TypeError: ``layout`` is not a `WeightLayout`.
        ValueError: neither or both are given.
    """
    if layout is not None and not isinstance(layout, WeightLayout):
        raise TypeError(f"layout must be a WeightLayout (weight_layout(model)), not {type(layout).__name__}")
    if model is not None and layout is not None:
        raise ValueError("pass model or layout, not both: layout=weight_layout(model, ...) sets options of the layout")
    if layout is not None:
        return layout
    if model is None:
        raise ValueError(
            "pass model=, whose layers determine the weight vectors; without a model, "
            "layout=gradcentral.WeightLayout.from_shapes(params) applies the shape rule"
        )
    return weight_layout(model)


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
    if layout.by_shape:
        name = f"parameter {name} of shape {tuple(parameter.shape)}"
        remedy = "pass model=, so that embeddings are recognized"
    raise ValueError(
        f"{name} has a sparse gradient, and centering would fill in its zeros: {remedy}, or make the gradient dense "
        "(sparse=False)"
    )


def _trained(pairs: list[Pair]) -> list[bool]:
    return [parameter.requires_grad for parameter, _ in pairs]


def _is_replaced(parameter: Tensor, now: Tensor | None) -> bool:
    """Return whether the model has another parameter in place of this one.

    FSDP2 temporarily puts gathered parameters in place of sharded ones: they have fewer mesh dimensions.
    """
    return now is not parameter and (now is None or _mesh_dimensions(now) >= _mesh_dimensions(parameter))


def _mesh_dimensions(tensor: Tensor) -> int:
    mesh = getattr(tensor, "device_mesh", None)
    return 0 if mesh is None else int(mesh.ndim)
