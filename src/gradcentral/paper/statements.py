"""All statements of the paper, measured on one network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from gradcentral.attach import centralize
from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.paper import initial_weights, theorem_4_1, theorem_4_2
from gradcentral.paper.gradients import Batch, Loss
from gradcentral.paper.measurement import Measurement, NotMeasurableError

__all__ = ["Measurements", "measure_all"]


class SkippedStatement(NamedTuple):
    """A statement that was not measured, and the reason."""

    source: str
    statement: str
    reason: str


class Measurements(list[Measurement]):
    """The statements that were measured; ``skipped`` has those that could not be measured."""

    def __init__(self, measured: Iterable[Measurement] = ()) -> None:
        super().__init__(measured)
        self.skipped: list[SkippedStatement] = []

    def add(self, source: str, statement: str, measure: Callable[[], list[Measurement]]) -> None:
        """Measure a statement, or record why it was skipped."""
        try:
            self += measure()
        except (NotMeasurableError, NotImplementedError) as error:
            self.skipped.append(SkippedStatement(source, statement, str(error)))


def measure_all(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    gamma: float = 1.0,
    tolerance: float = 1e-3,
) -> Measurements:
    """Measure every statement of the paper on one network.

    Two copies of the model are trained, one step per batch, with the same random numbers: one with GC, placement
    ``"update"``, and one without. Statements about arbitrary weights are measured on the first copy and the first
    batch; statements about training are measured on both copies (``Measurement.without``).

    Args:
        model: a freshly initialized model, which is not changed. The copies train in training mode; modules in
            evaluation mode in a model in training mode (frozen BatchNorm) remain in evaluation mode.
        loss: ``loss(output, target)`` -> scalar.
        batches: pairs ``(input, target)``, or mappings for ``model(**batch)`` and ``loss(output, batch)``; read once.
        optimizer: ``factory(parameters)`` -> a plain ``torch.optim.Optimizer``, without GC.
        gamma: the constant added to the inputs of a layer for theorem 4.1.
        tolerance: the tolerance of the Hessian's largest eigenvalue.

    Returns:
        A list of `Measurement`; its ``skipped`` has the statements about layers that the network does not have.

    Raises:
        ValueError: there is no batch; nothing is centered; the model cannot be copied.
        TypeError: a batch is neither a pair nor a mapping; a parameter is complex.

    Examples:
        >>> batches = [(torch.randn(8, 5), torch.randn(8, 2)) for _ in range(3)]
        >>> sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)
        >>> found = measure_all(torch.nn.Linear(5, 2), torch.nn.functional.mse_loss, batches, sgd)
        >>> len(found), all(measured.holds for measured in found), found.skipped
        (15, True, [])
    """
    initial_weights.check_copyable(model)
    with_gc = copy.deepcopy(model)
    if not model.training:  # in a training model, frozen modules remain in evaluation mode
        with_gc.train()
    without_gc = copy.deepcopy(with_gc)
    trained = [[p for p in copied.parameters() if p.requires_grad] for copied in (with_gc, without_gc)]
    gc_optimizer, plain_optimizer = map(optimizer, trained)
    centralize(gc_optimizer, with_gc, "update")
    first, steps = None, 0
    with preserve_state():
        for batch in batches:
            first, steps = batch if first is None else first, steps + 1
            with preserve_state():
                _step(with_gc, gc_optimizer, loss, batch)
            _step(without_gc, plain_optimizer, loss, batch)
    if first is None:
        raise ValueError("batches: give at least one (input, target)")
    shift = partial(theorem_4_1.intensity_shift, before=model, batch=first, steps=steps, gamma=gamma)
    curvature = partial(theorem_4_2.gradient_lipschitzness, with_gc, loss, first, tolerance=tolerance)

    def compared(measure: Callable[[nn.Module], Measurement]) -> list[Measurement]:
        return [measure(with_gc)._replace(without=measure(without_gc).value)]

    found = Measurements(theorem_4_2.projection_identities(with_gc, loss, first))
    found += compared(partial(theorem_4_1.hyperplane, before=model, steps=steps))
    found.add("theorem 4.1", theorem_4_1.THEOREM_4_1, lambda: compared(shift))
    found.add("section 4.1", initial_weights.SECTION_4_1, lambda: initial_weights.initial_means_near_zero(model))
    found.append(initial_weights.centered_initialization(model))
    found += theorem_4_2.loss_lipschitzness(with_gc, loss, first)
    found.add("theorem 4.2", theorem_4_2.THEOREM_4_2, curvature)
    return found


def _step(model: nn.Module, optimizer: Optimizer, loss: Loss, batch: Batch) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss_of(model, loss, batch))
    optimizer.step()
