"""Which of an optimizer's parameters are centered, and what is refused: shared by the hooks and the optimizers."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.kernels.forms import same_objects
from gradcentral.layout import WeightLayout
from gradcentral.weight_vectors import WeightVectors

__all__ = ["PLACEMENTS", "Targets", "check_placement", "refuse_sparse"]

PLACEMENTS = ("gradient", "update")


def check_placement(placement: str) -> None:
    """Refuse a placement that does not exist."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be {' or '.join(map(repr, PLACEMENTS))}, not {placement!r}")


class Targets:
    """What an optimizer's step centers: a layout, a placement, and the parameters as they are at each step.

    Follows what changes while training: parameter groups added later, lazy parameters that have received their shape,
    layers added to the model.

    Attributes:
        layout: the weight vectors of the model's parameters.
        placement: one of `PLACEMENTS`.
        paused: whether steps are plain for now.
    """

    def __init__(self, layout: WeightLayout, placement: str) -> None:
        check_placement(placement)
        self.layout = layout
        self.placement = placement
        self.paused = False
        self._strangers: set[Tensor] = set()
        # What was found, and for which parameters and decisions: seldom do they change.
        self._found: list[tuple[Tensor, WeightVectors]] = []
        self._parameters: list[Tensor] = []
        self._revision = -1
        # What was there when attaching, until the first step has looked whether it still is.
        self._attached: list[tuple[str, Tensor, WeightVectors]] = []

    def of(self, optimizer: Optimizer, warn: bool = True) -> list[tuple[Tensor, WeightVectors]]:
        """The optimizer's centered parameters with their weight vectors.

        A parameter that is not the model's is left alone, with one warning unless ``warn`` is off.
        """
        layout = self.layout
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if layout.revision == self._revision and same_objects(parameters, self._parameters) and not layout.pending:
            return self._found
        new = [p for p in parameters if not layout.in_model(p) and p not in self._strangers]
        if new or layout.pending:
            layout.refresh()
            strangers = [p for p in new if not layout.in_model(p)]
            self._strangers.update(strangers)
            if strangers and warn:
                shapes = ", ".join(str(tuple(p.shape)) for p in strangers)
                warnings.warn(
                    f"the optimizer got parameters that are not the model's, of shape {shapes}: they are left alone; "
                    "call gradcentral.centralize on the optimizer with their model too",
                    stacklevel=4,
                )
        self._found = [(p, vectors) for p in parameters if (vectors := layout.get(p)) is not None]
        self._parameters, self._revision = parameters, layout.revision
        return self._found

    def first(self, optimizer: Optimizer) -> list[tuple[Tensor, WeightVectors]]:
        """As `of`, when attaching: parameters of other models are fine, nothing to center is not.

        Raises:
            ValueError: none of the model's parameters is in the optimizer, or none of them is centered.
        """
        targets, layout = self.of(optimizer, warn=False), self.layout
        names = layout.names
        self._attached = [(names[p], p, vectors) for p, vectors in targets]
        if targets or layout.pending:
            return targets
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Of several ranks one may own biases alone: ZeroRedundancyOptimizer, pipeline stages.
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not any(layout.in_model(p) for p in parameters) and (parameters or not several):
            flat = parameters and all(p.ndim <= 1 for p in parameters)
            raise ValueError(
                "none of the model's parameters is in the optimizer: give the model whose parameters it was made with "
                "(make the optimizer after moving, wrapping or sharding the model)"
                + (f"; flat partitions, as of DeepSpeed's ZeRO, can't be centered: {_KEEPS_SHAPES}" if flat else "")
            )
        if several:
            return targets
        held = {names[p] for p in parameters if layout.in_model(p)}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in layout.skipped.items() if name in held)
        raise ValueError(f"nothing is left to center in this optimizer ({reasons})")

    def check(self, optimizer: Optimizer) -> None:
        """At the first step: that the parameters which were there when attaching have not been replaced since.

        Raises:
            RuntimeError: sharding, flattening or rebuilding the model has left the optimizer with parameters that are
                no longer the model's, or has changed their shapes.
            ValueError: the model has been wrapped in FSDP1.
        """
        if not self._attached or torch.compiler.is_compiling():
            return
        attached = self._attached
        standing = self.layout.current_parameters()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if not any(p in held for _, p, _ in attached):
            raise RuntimeError(
                "the optimizer has lost all parameters that were to be centered: something (DeepSpeed's ZeRO does so) "
                f"has put others into it since; {_KEEPS_SHAPES}"
            )
        for name, p, vectors in attached:
            if p.shape != vectors.shape:
                raise RuntimeError(
                    f"{name} had shape {vectors.shape} when Gradient Centralization was attached and has "
                    f"{tuple(p.shape)} now: attach after all that re-shapes parameters; {_KEEPS_SHAPES}"
                )
        if standing is not None:
            self._check_standing(attached, standing, held)
        self._attached = []

    def _check_standing(
        self, attached: list[tuple[str, Tensor, WeightVectors]], standing: dict[str, Tensor], held: set[Tensor]
    ) -> None:
        here = set(standing.values())
        lost = [
            name
            for name, p, _ in attached
            # Under another name it still trains, and so does another one in its place that the optimizer has got.
            if p not in here and _is_lost(p, standing.get(name)) and standing.get(name) not in held
        ]
        # A layer that was taken out of the model and not replaced is no reason to stop.
        if lost and (len(lost) == len(attached) or any(name in standing for name in lost)):
            raise RuntimeError(
                "the optimizer holds parameters that are no longer the model's and trains nothing by them "
                f"({', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}): make the optimizer, and attach Gradient "
                "Centralization, after fully_shard, parallelize_module and all else that replaces parameters"
            )


_KEEPS_SHAPES = (
    "torch.distributed.fsdp.fully_shard (FSDP2) and ZeroRedundancyOptimizer keep the shapes of parameters: use one of "
    "them"
)


def _is_lost(parameter: Tensor, now: Tensor | None) -> bool:
    """Whether the model has another parameter in the place of this one.

    FSDP2 puts gathered parameters into the place of sharded ones for a while: they are on fewer mesh dimensions.
    """
    return now is not parameter and (now is None or _mesh_dimensions(now) >= _mesh_dimensions(parameter))


def _mesh_dimensions(tensor: Tensor) -> int:
    mesh = getattr(tensor, "device_mesh", None)
    return 0 if mesh is None else int(mesh.ndim)


def refuse_sparse(gradient: Tensor, parameter: Tensor, layout: WeightLayout) -> None:
    """Refuse a gradient that can't be centered without filling its zeros, naming its parameter."""
    if gradient.layout != torch.strided:
        name = layout.names[parameter]
        way_out = f"leave it alone with layout=weight_layout(model, exclude=[{name!r}])"
        if layout.by_shape:
            name = f"parameter {name} of shape {tuple(parameter.shape)}"
            way_out = "give the model, whose layers tell what an embedding is"
        raise ValueError(
            f"{name} has a sparse gradient, and centering would fill its zeros: {way_out}, or make the gradient dense "
            "(sparse=False)"
        )
