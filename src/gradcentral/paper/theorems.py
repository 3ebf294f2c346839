"""The statements of the paper, measured on a real network with its real gradients."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcentral.attach import centralize
from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.initialization import SCHEMES, center_weights_, initial_means
from gradcentral.layout import WeightLayout, weight_layout
from gradcentral.paper.hessian import Batch, Loss, hessian_matrix, projected_norm, top_eigenvalue
from gradcentral.paper.output_shift import counterpart, intensity_responses, plain_layers
from gradcentral.paper.rows import as_rows
from gradcentral.paper.statements import LeftOut, Measured, NotMeasurableError, Statements, worst
from gradcentral.projection import center, projection_matrix
from gradcentral.weight_vectors import WeightVectors

__all__ = [
    "Measured",
    "Statements",
    "centered_initialization",
    "gradient_lipschitzness",
    "hyperplane",
    "initialization",
    "intensity_shift",
    "loss_lipschitzness",
    "measure_all",
    "projection_identities",
]

# A mean in a few more bits than eps and one rounding of the difference: what Φ may be off by, in eps of ‖g‖.
_CENTERING = 4
# A product with ∇²L rounds its own way each time. Up to 4 eps of ‖∇²L‖ were seen, in 2000 small networks.
_CURVATURE = 16


def projection_identities(
    model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout | None = None
) -> list[Measured]:
    """P² = P, Pᵀ = P and eᵀP = 0, on the network's gradient of each weight vector.

    Args:
        model: left as it is; runs in the mode it is in.
        loss: ``loss(output, target)`` -> scalar.
        batch: ``(input, target)``, or a mapping, passed as ``model(**batch)`` and ``loss(output, batch)``.
        layout: which weight vectors; None: ``weight_layout(model)``.

    Returns:
        One `Measured` for each identity. Φ is computed in the gradients' dtype, its deviation in double precision.

    Raises:
        ValueError: nothing is centered.

    Source: Yong et al. 2020, eq. 2 and what follows from it.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(5, 2)
        >>> mse = torch.nn.functional.mse_loss
        >>> [m.holds for m in projection_identities(model, mse, (torch.randn(8, 5), torch.randn(8, 2)))]
        [True, True, True]
    """
    layout = _layout(model, layout)
    idempotent, symmetric, orthogonal = [], [], []
    for name, w, g, vectors in _gradients(model, loss, batch, layout):
        rows, weights = as_rows(_wide(g), vectors), as_rows(_wide(w), vectors)
        once = center(g, vectors)
        centered = as_rows(_wide(once), vectors)
        twice = as_rows(_wide(center(once, vectors)), vectors)
        idempotent.append((name, _part((twice - centered).norm(dim=1), rows.norm(dim=1))))
        # ⟨Φ(g), w⟩ = ⟨g, Φ(w)⟩, with the weights as the second real vector.
        crossed = as_rows(_wide(center(w.detach(), vectors)), vectors)
        apart = ((centered.conj() * weights).sum(1) - (rows.conj() * crossed).sum(1)).abs()
        symmetric.append((name, _part(apart, rows.norm(dim=1) * weights.norm(dim=1))))
        along_e = centered.sum(1).abs() / math.sqrt(vectors.fan_in)
        orthogonal.append((name, _part(along_e, rows.norm(dim=1))))
    eps, dtype = _eps(layout)
    one, two = _CENTERING, 2 * _CENTERING
    return [
        _of(
            "eq. 2", "P² = P: centering twice is centering once", "‖Φ(Φ(g)) − Φ(g)‖ / ‖g‖", idempotent, one, eps, dtype
        ),
        _of(
            "eq. 2",
            "Pᵀ = P: the projection is orthogonal",
            "|⟨Φ(g),w⟩ − ⟨g,Φ(w)⟩| / ‖g‖‖w‖",
            symmetric,
            two,
            eps,
            dtype,
        ),
        _of("eq. 2", "eᵀP = 0: a centered gradient has mean zero", "|eᵀΦ(g)| / ‖g‖", orthogonal, one, eps, dtype),
    ]


def loss_lipschitzness(
    model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout | None = None
) -> list[Measured]:
    """Theorem 4.2, of the loss: ‖Φ(∇L)‖ ≤ ‖∇L‖, by exactly the part along e, for each weight vector.

    Args:
        model, loss, batch, layout: as `projection_identities`.

    Raises:
        ValueError: nothing is centered.

    Source: Yong et al. 2020, theorem 4.2 and its proof.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(5, 2)
        >>> mse = torch.nn.functional.mse_loss
        >>> [m.holds for m in loss_lipschitzness(model, mse, (torch.randn(8, 5), torch.randn(8, 2)))]
        [True, True]
    """
    layout = _layout(model, layout)
    pythagoras, ratio, lengths = [], [], []
    for name, _, g, vectors in _gradients(model, loss, batch, layout):
        rows, centered = as_rows(_wide(g), vectors), as_rows(_wide(center(g, vectors)), vectors)
        along_e = rows.sum(1).abs() / math.sqrt(vectors.fan_in)
        whole, left = rows.norm(dim=1), centered.norm(dim=1)
        pythagoras.append((name, _part((left**2 - (whole**2 - along_e**2)).abs(), whole**2)))
        ratio.append((name, _part(left, whole)))
        lengths.append((float(left.norm()), float(whole.norm())))
    eps, dtype = _eps(layout)
    shorter, where = worst(ratio)
    left_of_all, all_of_it = (math.hypot(*norms) for norms in zip(*lengths, strict=True))
    together = left_of_all / all_of_it if all_of_it else 0.0
    return [
        Measured(
            "theorem 4.2",
            "the loss changes no faster along the hyperplane: a centered gradient is no longer",
            "‖Φ(∇L)‖ / ‖∇L‖",
            shorter,
            1 + _CENTERING * eps,
            f"1 + {_CENTERING} eps({dtype})",
            f"{where}; all together {together:.3f}",
        ),
        _of(
            "theorem 4.2, proof",
            "what centering takes from the gradient's length is its part along e",
            "|‖Φ(∇L)‖² − (‖∇L‖² − (eᵀ∇L)²)| / ‖∇L‖²",
            pythagoras,
            2 * _CENTERING,
            eps,
            dtype,
        ),
    ]


def gradient_lipschitzness(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    layout: WeightLayout | None = None,
    *,
    largest_fan_in: int = 512,
    tolerance: float = 1e-3,
) -> list[Measured]:
    """Theorem 4.2, of the gradient: ‖P∇²L‖ ≤ ‖∇²L‖ in the spectral norm.

    Exactly, for the weight vector of each parameter that has the longest gradient, as the theorem states it; and by
    Lanczos iteration for all parameters that train at once, P then being the identity on those that are not centered.

    Args:
        model, loss, batch, layout: as `projection_identities`.
        largest_fan_in: parameters of a larger fan-in M are left out of the exact part, which takes M products with ∇²L
            for each parameter. If all are larger there is no exact part.
        tolerance: of the iteration (see `top_eigenvalue`).

    Returns:
        The exact ratio, if there is one, then ‖P∇²L‖ and ‖P∇²LP‖ of the whole network against ‖∇²L‖.

    Raises:
        ValueError: nothing that trains is centered.
        NotImplementedError: torch can't differentiate a part of the model twice.

    Source: Yong et al. 2020, theorem 4.2: ‖∇Φ(∇L)‖ ≤ ‖∇²L‖.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(5, 2)
        >>> mse = torch.nn.functional.mse_loss
        >>> [m.holds for m in gradient_lipschitzness(model, mse, (torch.randn(8, 5), torch.randn(8, 2)))]
        [True, True, True]
    """
    layout = _layout(model, layout)
    blocks = []
    for name, w, g, vectors in _gradients(model, loss, batch, layout):
        if vectors.fan_in <= largest_fan_in:
            unit = int(as_rows(_wide(g), vectors).norm(dim=1).argmax())
            elements = as_rows(torch.arange(w.numel()).reshape(w.shape), vectors)[unit].tolist()
            H = hessian_matrix(model, loss, batch, parameters=[w], elements=elements).double()
            P = projection_matrix(vectors.fan_in, dtype=H.dtype, device=H.device)
            blocks.append((f"{name}, unit {unit}", _part(_spectral(P @ H), _spectral(H))))
    source, statement = "theorem 4.2", "the gradient changes no faster along the hyperplane"
    found = []
    if blocks:
        value, where = max(((float(ratio), name) for name, ratio in blocks), key=lambda pair: pair[0])
        found.append(
            Measured(
                source,
                f"{statement}: one weight vector, its Hessian exact",
                "‖P∇²L‖ / ‖∇²L‖",
                value,
                1 + _CENTERING * torch.finfo(torch.float64).eps,
                f"1 + {_CENTERING} eps(float64)",
                f"{where}; {len(blocks)} of {len(layout)} parameters looked at",
            )
        )
    top = top_eigenvalue(model, loss, batch, tolerance=tolerance)
    projected = projected_norm(model, loss, batch, layout, tolerance=tolerance)
    within = top_eigenvalue(model, loss, batch, layout=layout, tolerance=tolerance)
    eps, dtype = _eps(p for p in model.parameters() if p.requires_grad)
    bound = abs(top.value) * (1 + _CURVATURE * eps) + top.residual
    for formula, number in (("‖P∇²L‖", projected), ("‖P∇²LP‖", within)):
        found.append(
            Measured(
                source,
                f"{statement}: the whole network",
                formula,
                abs(number.value),
                bound,
                f"‖∇²L‖ = {abs(top.value):.4g}, times 1 + {_CURVATURE} eps({dtype}), + its residual {top.residual:.1e}",
                f"{number.iterations} Lanczos iterations, residual {number.residual:.1e}"
                + ("" if number.converged and top.converged else ", NOT converged"),
            )
        )
    return found


def hyperplane(model: nn.Module, before: nn.Module, steps: int, layout: WeightLayout | None = None) -> Measured:
    """eᵀ(w − w⁰) = 0 after training: the weights have stayed on the hyperplane where they began.

    So it is under placement ``"update"``, and under SGD without weight decay under both.

    Args:
        model: trained.
        before: the same model with its initial weights w⁰ (``copy.deepcopy`` it before training).
        steps: how many optimizer steps lie between them; each may round every weight.
        layout: which weight vectors of ``model``; None: ``weight_layout(model)``.

    Raises:
        ValueError: nothing is centered; ``before`` is another model; steps < 1.

    Source: Yong et al. 2020, section 4.1, weight space regularization.

    Examples:
        >>> import copy, torch, gradcentral
        >>> model = torch.nn.Linear(5, 2)
        >>> before = copy.deepcopy(model)
        >>> optimizer = gradcentral.AdamW(model, lr=0.1, placement="update")
        >>> model(torch.randn(8, 5)).square().sum().backward()
        >>> optimizer.step()
        >>> hyperplane(model, before, steps=1).holds
        True
    """
    layout = _layout(model, layout)
    _check_steps(steps)
    drifts = []
    for w, vectors in layout.items():
        name = layout.names[w]
        now, start = as_rows(_wide(w), vectors), as_rows(_wide(counterpart(before, name, w)), vectors)
        drift = (now - start).sum(1).abs() / math.sqrt(vectors.fan_in)
        drifts.append((name, _part(drift, torch.maximum(now.norm(dim=1), start.norm(dim=1)))))
    eps, dtype = _eps(layout)
    return _of(
        "section 4.1",
        "training stays on the hyperplane through w⁰ that is orthogonal to e",
        "|eᵀ(w − w⁰)| / ‖w‖",
        drifts,
        steps,
        eps,
        dtype,
        "one rounding of w a step",
    )


def intensity_shift(
    model: nn.Module,
    before: nn.Module,
    batch: Batch,
    steps: int,
    gamma: float = 1.0,
    layout: WeightLayout | None = None,
) -> Measured:
    """Theorem 4.1: adding γ to all inputs of a unit changes its output by γ·1ᵀw⁰, however long it was trained.

    Args:
        model, before, steps: as `hyperplane`.
        batch, gamma, layout: as `intensity_responses`, which returns the numbers themselves, unit by unit.

    Raises:
        NotMeasurableError, ValueError: as `intensity_responses`; steps < 1.

    Source: Yong et al. 2020, theorem 4.1.

    Examples:
        >>> import copy, torch, gradcentral
        >>> model = torch.nn.Linear(5, 2)
        >>> before = copy.deepcopy(model)
        >>> optimizer = gradcentral.SGD(model, lr=0.1)
        >>> model(torch.randn(8, 5)).square().sum().backward()
        >>> optimizer.step()
        >>> intensity_shift(model, before, (torch.randn(8, 5), None), steps=1).holds
        True
    """
    layout = _layout(model, layout)
    _check_steps(steps)
    responses = intensity_responses(model, before, batch, gamma, layout=layout)
    eps, dtype = _eps(layout)
    # The two outputs that are subtracted are rounded as x is large, in double precision.
    outputs = 8 * (1 + max(response.intensity for response in responses) / abs(gamma))
    value, where = worst((response.name, _part(response.error, response.scale)) for response in responses)
    return Measured(
        "theorem 4.1",
        f"x → x + γ1 changes an output by γ1ᵀw⁰ alone (γ = {gamma:g})",
        "|wᵀ(x+γ1) − wᵀx − γ1ᵀw⁰| / γ√M‖w‖",
        value,
        steps * eps + outputs * torch.finfo(torch.float64).eps,
        f"{steps} eps({dtype}): one rounding of w a step",
        where,
    )


def initialization(model: nn.Module, layout: WeightLayout | None = None, seed: int = 0) -> list[Measured]:
    """mean(w⁰) ≈ 0 under Xavier and Kaiming initialization, for layers of the model's shapes.

    Args:
        model: whose Linear and convolution layers give the shapes; its weights are not looked at.
        layout: which of them; None: those that ``weight_layout(model)`` centers.
        seed: of the draws.

    Returns:
        For each of `SCHEMES` how far the root mean square of mean(w⁰) is from σ/√M, all weight vectors together.

    Raises:
        NotMeasurableError: the model has no such layer; a ValueError.

    Source: Yong et al. 2020, section 4.1.

    Examples:
        >>> import torch
        >>> all(m.holds for m in initialization(torch.nn.Linear(50, 20)))
        True
    """
    shapes = [layer.get_parameter("weight").shape for _, layer in plain_layers(model, _layout(model, layout))]
    if not shapes:
        raise NotMeasurableError("model: it has no centered Linear or convolution whose weights could be drawn")
    found = []
    for scheme in SCHEMES:
        # A seed for each layer, or those of one shape would get the same weights.
        drawn = [initial_means(shape, scheme, seed=seed + index) for index, shape in enumerate(shapes)]
        standard = torch.cat([means.absolute / means.expected for means in drawn])
        typical = torch.cat([means.absolute for means in drawn]).median()
        found.append(
            Measured(
                "section 4.1",
                f"initial weight vectors have means near zero ({scheme})",
                "| rms(mean(w⁰) / (σ/√M)) − 1 |",
                abs(float(standard.square().mean().sqrt()) - 1),
                5 / math.sqrt(2 * len(standard)),
                f"5 standard errors of {len(standard)} means",
                f"median |mean(w⁰)| {float(typical):.2g}",
            )
        )
    return found


def centered_initialization(model: nn.Module, layout: WeightLayout | None = None) -> Measured:
    """1ᵀw⁰ = 0 after `center_weights_`, tried on a copy of the model.

    Args:
        model: left as it is.
        layout: which weight vectors; None: ``weight_layout(model)``.

    Raises:
        ValueError: nothing is centered; the model can't be copied.

    Source: Yong et al. 2020, section 4.1: the nearer mean(w⁰) is to zero, the less an output answers to γ.

    Examples:
        >>> import torch
        >>> centered_initialization(torch.nn.Linear(50, 20)).holds
        True
    """
    _check_copyable(model)
    copied, layout = copy.deepcopy((model, _layout(model, layout)))
    lengths = {w: as_rows(_wide(w), vectors).norm(dim=1) for w, vectors in layout.items()}
    center_weights_(copied, layout)
    sums = []
    for w, vectors in layout.items():
        along_e = as_rows(_wide(w), vectors).sum(1).abs() / math.sqrt(vectors.fan_in)
        sums.append((layout.names[w], _part(along_e, lengths[w])))
    eps, dtype = _eps(layout)
    return _of("section 4.1", "center_weights_ makes 1ᵀw⁰ zero", "|eᵀΦ(w⁰)| / ‖w⁰‖", sums, _CENTERING, eps, dtype)


def measure_all(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    gamma: float = 1.0,
    tolerance: float = 1e-3,
) -> Statements:
    """Every statement, measured on one network.

    Two copies of the model are trained, one step a batch, with the same random numbers: with GC, placement
    ``"update"``, and without. What holds of any weights is measured on the first copy, and its Hessian, on the first
    batch; what holds because of the training is measured on both (``Measured.without``).

    Args:
        model: freshly initialized; left as it is. The copies train in training mode, and parts that are in evaluation
            mode while the model trains (frozen BatchNorm) stay so.
        loss: ``loss(output, target)`` -> scalar.
        batches: ``(input, target)`` each, or a mapping, passed as ``model(**batch)`` and ``loss(output, batch)``; taken
            one by one as the copies train.
        optimizer: ``factory(parameters)`` -> a plain ``torch.optim.Optimizer``, without GC.
        gamma: what is added to the inputs of a layer for theorem 4.1.
        tolerance: of the Hessian's largest eigenvalue.

    Returns:
        A list of `Measured`; its ``left_out`` names the statements that need what this network does not have, such as a
        Linear or convolution for theorem 4.1.

    Raises:
        ValueError: there is no batch; nothing is centered; the model can't be copied.
        TypeError: a batch is neither a pair nor a mapping; a parameter is complex.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> batches = [(torch.randn(8, 5), torch.randn(8, 2)) for _ in range(3)]
        >>> sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)
        >>> found = measure_all(torch.nn.Linear(5, 2), torch.nn.functional.mse_loss, batches, sgd)
        >>> len(found), all(measured.holds for measured in found), found.left_out
        (15, True, ())
    """
    trained, plain = _Copy(model, optimizer, with_gc=True), _Copy(model, optimizer, with_gc=False)
    first, steps = None, 0
    with preserve_state():
        for batch in batches:
            first, steps = batch if first is None else first, steps + 1
            with preserve_state():
                trained.step(loss, batch)
            plain.step(loss, batch)
    if first is None:
        raise ValueError("batches: give at least one (input, target)")
    left_out: list[LeftOut] = []

    def of_training(measure: Callable[[nn.Module], Measured]) -> Measured:
        return dataclasses.replace(measure(trained.model), without=measure(plain.model).value)

    def where_possible(source: str, statement: str, measure: Callable[[], list[Measured]]) -> list[Measured]:
        try:
            return measure()
        except (NotMeasurableError, NotImplementedError) as error:
            left_out.append(LeftOut(source, statement, str(error)))
            return []

    found = [
        *projection_identities(trained.model, loss, first),
        of_training(lambda copied: hyperplane(copied, model, steps)),
        *where_possible(
            "theorem 4.1",
            "x → x + γ1 changes an output by γ1ᵀw⁰ alone",
            lambda: [of_training(lambda copied: intensity_shift(copied, model, first, steps, gamma))],
        ),
        *where_possible("section 4.1", "initial weight vectors have means near zero", lambda: initialization(model)),
        centered_initialization(model),
        *loss_lipschitzness(trained.model, loss, first),
        *where_possible(
            "theorem 4.2",
            "the gradient changes no faster along the hyperplane",
            lambda: gradient_lipschitzness(trained.model, loss, first, tolerance=tolerance),
        ),
    ]
    return Statements(found, left_out)


class _Copy:
    """A copy of a model, and how it is trained."""

    def __init__(self, model: nn.Module, factory: Callable[[list[nn.Parameter]], Optimizer], *, with_gc: bool) -> None:
        _check_copyable(model)
        self.model = copy.deepcopy(model)
        if not self.model.training:
            self.model.train()
        self._optimizer = factory([p for p in self.model.parameters() if p.requires_grad])
        if with_gc:
            centralize(self._optimizer, self.model, "update")

    def step(self, loss: Loss, batch: Batch) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(loss_of(self.model, loss, batch))
        self._optimizer.step()


def _check_copyable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"model: {f'{name}.{attribute}'.lstrip('.')} is computed from parameters and kept as a plain "
                    "attribute, so that the model can't be copied; where torch.nn.utils.weight_norm (or spectral_norm) "
                    "made it, use torch.nn.utils.parametrizations.weight_norm (or spectral_norm)"
                )


def _gradients(
    model: nn.Module, loss: Loss, batch: Batch, layout: WeightLayout
) -> list[tuple[str, Tensor, Tensor, WeightVectors]]:
    """Name, weights, gradient and weight vectors of each centered parameter that trains."""
    trained = [(w, vectors) for w, vectors in layout.items() if w.requires_grad]
    if not trained:
        raise ValueError("layout: none of the parameters that it centers needs a gradient")
    with preserve_state(model), torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(model, loss, batch), [w for w, _ in trained], materialize_grads=True)
    return [(layout.names[w], w, g, vectors) for (w, vectors), g in zip(trained, gradients, strict=True)]


def _layout(model: nn.Module, layout: WeightLayout | None) -> WeightLayout:
    layout = weight_layout(model) if layout is None else layout
    if not layout:
        raise ValueError(f"nothing is centered: {layout.summary()}")
    return layout


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))


def _part(numbers: Tensor, whole: Tensor) -> Tensor:
    """numbers / whole; where the whole is 0 (a dead unit), the number itself."""
    return numbers / torch.where(whole > 0, whole, 1)


def _spectral(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return norm


def _eps(parameters: Iterable[Tensor]) -> tuple[float, str]:
    """The coarsest rounding among these parameters, and whose it is."""
    dtype = max((w.dtype for w in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.finfo(dtype).eps, str(dtype).removeprefix("torch.")


def _of(
    source: str,
    statement: str,
    formula: str,
    numbers: list[tuple[str, Tensor]],
    factor: int,
    eps: float,
    dtype: str,
    because: str = "",
) -> Measured:
    """The largest deviation from an equation that holds but for rounding."""
    value, where = worst(numbers)
    allowance = f"{factor} eps({dtype})" + (f": {because}" if because else "")
    return Measured(source, statement, formula, value, factor * eps, allowance, where)
