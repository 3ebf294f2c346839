"""Which of an optimizer's parameters are centered, and what is refused: shared by the hooks and the optimizers."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcentral.layout import WeightLayout
from gradcentral.vectors import WeightVectors

__all__ = ["PLACEMENTS", "Targets", "check_placement", "refuse_sparse", "same_objects"]

PLACEMENTS = ("gradient", "update")


def check_placement(placement: str) -> None:
    """Refuse a placement that does not exist."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be {' or '.join(map(repr, PLACEMENTS))}, not {placement!r}")


class Targets:
    """The parameters of an optimizer that a layout centers, as they are at each step.

    Follows what changes while training: parameter groups added later, lazy parameters that have got their shape,
    layers added to the model.
    """

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout
        self._strangers: set[Tensor] = set()
        # What was found, and for which parameters and decisions: seldom do they change.
        self._found: list[tuple[Tensor, WeightVectors]] = []
        self._parameters: list[Tensor] = []
        self._revision = -1

    def of(self, optimizer: Optimizer, warn: bool = True) -> list[tuple[Tensor, WeightVectors]]:
        """The optimizer's centered parameters with their weight vectors.

        A parameter that is not the model's is left alone, with one warning unless ``warn`` is off.
        """
        layout = self.layout
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if layout.revision == self._revision and same_objects(parameters, self._parameters) and not layout.pending:
            return self._found
        new = [p for p in parameters if not layout.knows(p) and p not in self._strangers]
        if new or layout.pending:
            layout.refresh()
            strangers = [p for p in new if not layout.knows(p)]
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
        if targets or layout.pending:
            return targets
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(layout.knows(p) for p in parameters):
            raise ValueError(
                "none of the model's parameters is in the optimizer: give the model whose parameters it was made with "
                "(make the optimizer after moving, wrapping or sharding the model)"
            )
        held = {layout.names[p] for p in parameters if layout.knows(p)}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in layout.skipped.items() if name in held)
        raise ValueError(f"nothing is left to center in this optimizer ({reasons})")


def same_objects(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two sequences hold the very same objects; ``==`` would compare tensors element by element."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


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
