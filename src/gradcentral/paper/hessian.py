"""The curvature of a loss without its matrix: ∇²L times a vector, its largest eigenvalue, and what P leaves of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.layout import WeightLayout
from gradcentral.projection import center

__all__ = [
    "Batch",
    "Eigenvalue",
    "Loss",
    "hessian_matrix",
    "hessian_vector_product",
    "lanczos",
    "projected_norm",
    "top_eigenvalue",
]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(output, target)`` -> scalar tensor."""
Batch: TypeAlias = "tuple[Any, Any] | Mapping[str, Any]"
"""``(input, target)``, the model being called with the input alone; or a mapping, passed as ``model(**batch)`` and
``loss(output, batch)``."""
_P = TypeVar("_P", bound=Tensor)
_Multiply: TypeAlias = Callable[[Tensor], Tensor]


class Eigenvalue(NamedTuple):
    """The eigenvalue of largest absolute value that an iteration found.

    Attributes:
        value: the eigenvalue λ, with its sign.
        residual: ‖Av − λv‖ for its unit vector v: some eigenvalue of A is at least as near to ``value``.
        iterations: multiplications by A that it took.
        converged: whether the residual is within the tolerance asked for, and no eigenvalue of the other sign may be
            larger by what the iteration knows of it.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def hessian_vector_product(model: nn.Module, loss: Loss, batch: Batch, vector: Mapping[_P, Tensor]) -> dict[_P, Tensor]:
    """∇²L v, exact, for the Hessian over those parameters that are the keys of ``vector``.

    The model runs in the mode it is in (dropout draws one mask) and is left as it was: gradients, buffers, random
    numbers.

    Args:
        model: at its present weights.
        loss: ``loss(output, target)`` -> scalar.
        batch: ``(input, target)``, or a mapping (see `Batch`).
        vector: {parameter: its part of v, of the same shape}.

    Returns:
        {parameter: its part of ∇²L v}.

    Raises:
        ValueError: no parameter; one that is not the model's or needs no gradient; a part of another shape.
        TypeError: a parameter is complex; the batch is neither a pair nor a mapping.
        NotImplementedError: torch can't differentiate a part of the model twice (``nn.EmbeddingBag``).

    Examples:
        L(w) = ½(3w₀² + w₁²):

        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[3.0**0.5, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> half_squares = lambda output, target: (output - target).square().sum() / 2
        >>> v = {model.weight: torch.tensor([[1.0, 1.0]])}
        >>> hessian_vector_product(model, half_squares, (x, y), v)[model.weight].round(decimals=4)
        tensor([[3., 1.]])
    """
    parameters = _chosen(model, vector)
    for (name, p), part in zip(_named(model, parameters), vector.values(), strict=True):
        if part.shape != p.shape:
            raise ValueError(f"vector: {name} has shape {tuple(p.shape)}, its part {tuple(part.shape)}")
    with _hessian(model, loss, batch, parameters) as multiply:
        products = _split(multiply(_flat(vector.values())), parameters)
    return {p: product.to(p.dtype) for p, product in zip(vector, products, strict=True)}


def hessian_matrix(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    parameters: Iterable[Tensor] | None = None,
    elements: Sequence[int] | None = None,
) -> Tensor:
    """∇²L as a matrix: one product with it for each of its columns, so for small networks or few elements.

    Args:
        model, loss, batch: as `hessian_vector_product`.
        parameters: over which the loss is differentiated; None: all that need a gradient, in the model's order.
        elements: take only the rows and columns of these elements, counted along the flattened parameters, one
            parameter after the other; None: all of them.

    Returns:
        A symmetric matrix (to rounding), ``[n, n]`` for n elements.

    Raises:
        ValueError, TypeError, NotImplementedError: as `hessian_vector_product`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> squares = lambda output, target: (output - target).square().sum()
        >>> hessian_matrix(model, squares, (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)))
        tensor([[2., 4., 2.],
                [4., 8., 4.],
                [2., 4., 2.]])
    """
    chosen = _chosen(model, parameters)
    like = _flat(p.detach() for p in chosen)
    wanted = torch.arange(like.numel()) if elements is None else torch.as_tensor(elements)
    rows = []
    with _hessian(model, loss, batch, chosen) as multiply:
        for element in wanted.tolist():
            unit = torch.zeros_like(like)
            unit[element] = 1
            rows.append(multiply(unit)[wanted.to(like.device)])
    return torch.stack(rows)


def top_eigenvalue(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    parameters: Iterable[Tensor] | None = None,
    layout: WeightLayout | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
    seed: int = 0,
) -> Eigenvalue:
    """The eigenvalue of ∇²L, or of P∇²LP, of largest absolute value: its spectral norm, with a sign.

    P∇²LP is the curvature within the hyperplane where Gradient Centralization moves the weights; P∇²L has the same
    eigenvalues. P centers the parameters of the layout and leaves the others as they are.

    Args:
        model, loss, batch: as `hessian_vector_product`.
        parameters: over which the loss is differentiated; None: all that need a gradient.
        layout: project with it (P∇²LP); None: ∇²L itself.
        tolerance: stop when the residual is at most this part of the eigenvalue.
        max_iterations: at most so many products with ∇²L, and so many vectors of the parameters' size in memory.
        seed: of the random vector it starts from; the generators in use elsewhere are left alone.

    Returns:
        An `Eigenvalue`. Look at ``converged``.

    Raises:
        ValueError, TypeError, NotImplementedError: as `hessian_vector_product`; the tolerance is not positive;
            max_iterations < 1.

    Source: Lanczos iteration with full reorthogonalization; products by differentiating twice (Pearlmutter 1994).

    Examples:
        >>> import torch
        >>> from gradcentral import weight_layout
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> squares = lambda output, target: (output - target).square().sum()
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> round(top_eigenvalue(model, squares, batch).value, 4)
        10.0
        >>> round(top_eigenvalue(model, squares, batch, layout=weight_layout(model)).value, 4)
        1.0
    """
    chosen = _chosen(model, parameters)
    with _hessian(model, loss, batch, chosen) as multiply:
        if layout is None:
            return lanczos(multiply, _start(chosen, seed), tolerance, max_iterations)
        P = _projection(chosen, layout)
        return lanczos(lambda v: P(multiply(P(v))), P(_start(chosen, seed)), tolerance, max_iterations)


def projected_norm(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    layout: WeightLayout,
    *,
    parameters: Iterable[Tensor] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
    seed: int = 0,
) -> Eigenvalue:
    """‖P∇²L‖, the spectral norm of the centered gradient's derivative: √ of the top eigenvalue of ∇²L P ∇²L.

    Args:
        model, loss, batch, parameters, layout, max_iterations, seed: as `top_eigenvalue`; each iteration takes two
            products with ∇²L.
        tolerance: of the norm, relative to it.

    Returns:
        An `Eigenvalue` whose ``value`` is the norm.

    Raises:
        ValueError, TypeError, NotImplementedError: as `top_eigenvalue`.

    Source: ‖∇Φ(∇L)‖ of theorem 4.2, Yong et al. 2020: (P∇²L)ᵀ(P∇²L) = ∇²L P ∇²L.

    Examples:
        ∇²L = 2xxᵀ with x = (1, 2), so that ‖P∇²L‖ = 2‖Px‖‖x‖ = √10:

        >>> import torch
        >>> from gradcentral import weight_layout
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> squares = lambda output, target: (output - target).square().sum()
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> round(projected_norm(model, squares, batch, weight_layout(model)).value, 4)
        3.1623
    """
    chosen = _chosen(model, parameters)
    P = _projection(chosen, layout)
    with _hessian(model, loss, batch, chosen) as multiply:
        # The square of a norm may be off by twice as much as the norm.
        square = lanczos(lambda v: multiply(P(multiply(v))), _start(chosen, seed), 2 * tolerance, max_iterations)
    norm = math.sqrt(max(0.0, square.value))
    return square._replace(value=norm, residual=square.residual / norm if norm > 0 else square.residual)


def lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, max_iterations: int) -> Eigenvalue:
    """The eigenvalue of largest absolute value of a symmetric A that is known by its products alone.

    Args:
        multiply: v -> Av, for vectors of the shape of ``start``.
        start: one-dimensional, with a component along every eigenvector: draw it at random.
        tolerance: stop when the residual is at most this part of the eigenvalue.
        max_iterations: products at most.

    Raises:
        ValueError: the tolerance is not positive, or max_iterations < 1.

    Examples:
        >>> import torch
        >>> A = torch.diag(torch.tensor([2.0, -5.0, 1.0]))
        >>> round(lanczos(A.mv, torch.ones(3), tolerance=1e-6, max_iterations=10).value, 4)
        -5.0
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    length = float(start.norm())
    if length == 0:  # nothing is left of the space
        return Eigenvalue(0.0, 0.0, 0, converged=True)
    basis = [start / length]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = multiply(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):  # once leaves what rounding made of the larger part
            for earlier in basis:
                image = image - (earlier @ image) * earlier
        beside.append(float(image.norm()))
        (value, residual), (other, other_residual) = _ritz(diagonal, beside)
        # Where the two ends of the spectrum are nearly as far out, the nearer one may be found first.
        settled = abs(other) + other_residual <= abs(value) or other_residual <= tolerance * abs(other)
        converged = residual <= tolerance * abs(value) and settled
        if converged or not math.isfinite(residual) or len(basis) in (max_iterations, start.numel()):
            return Eigenvalue(value, residual, len(basis), converged)
        basis.append(image / beside[-1])


def _ritz(diagonal: list[float], beside: list[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two ends of A's spectrum within the basis so far, the larger one first, each with its residual."""
    if not all(map(math.isfinite, (*diagonal, *beside))):
        return (math.nan, math.nan), (math.nan, math.nan)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))
    low, high = ((float(values[end]), beside[-1] * abs(float(vectors[-1, end]))) for end in (0, -1))
    return (high, low) if abs(high[0]) >= abs(low[0]) else (low, high)


@contextmanager
def _hessian(model: nn.Module, loss: Loss, batch: Batch, parameters: Sequence[Tensor]) -> Iterator[_Multiply]:
    """v -> ∇²L v on flat vectors. The gradient's graph is built once and walked for each product."""
    # The fast attention kernels can't be differentiated twice.
    with preserve_state(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        # An embedding table may have a sparse gradient.
        gradients = [
            gradient.to_dense()
            for gradient in torch.autograd.grad(
                loss_of(model, loss, batch), parameters, create_graph=True, materialize_grads=True
            )
        ]
        # Where the loss is linear in a parameter, or does not see it, its gradient is a constant.
        curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]

        def multiply(vector: Tensor) -> Tensor:
            if not curved:
                return torch.zeros_like(vector)
            parts = _split(vector, parameters)
            products = torch.autograd.grad(
                [gradients[index] for index in curved],
                parameters,
                [parts[index].to(gradients[index].dtype) for index in curved],
                retain_graph=True,
                materialize_grads=True,
            )
            return _flat(products).to(vector.dtype)

        yield multiply


def _projection(parameters: Sequence[Tensor], layout: WeightLayout) -> _Multiply:
    """P, block by block: Φ of the layout's parameters, the others as they are."""

    def project(vector: Tensor) -> Tensor:
        parts = _split(vector, parameters)
        return _flat(
            center(part, layout[p]) if p in layout else part for p, part in zip(parameters, parts, strict=True)
        )

    if not any(p in layout for p in parameters):
        raise ValueError("layout: it centers none of the parameters: give weight_layout(model)")
    return project


def _chosen(model: nn.Module, parameters: Iterable[Tensor] | None) -> list[Tensor]:
    """The parameters to differentiate by, checked."""
    if parameters is None:
        parameters = (p for p in model.parameters() if p.requires_grad)
    chosen = list(parameters)
    if not chosen:
        raise ValueError("parameters: there is none to differentiate by")
    for name, p in _named(model, chosen):
        if not p.requires_grad:
            raise ValueError(f"parameters: {name} needs no gradient: leave it out, or set requires_grad")
        if p.is_complex():
            raise TypeError(f"parameters: {name} is complex; the Hessian here is over real parameters")
    return chosen


def _named(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for p in parameters:
        if p not in names:
            raise ValueError(f"parameters: one of shape {tuple(p.shape)} is not the model's")
        yield names[p], p


def _start(parameters: Sequence[Tensor], seed: int) -> Tensor:
    like = _flat(p.detach() for p in parameters)
    # Drawn on the CPU, so that every device starts from the same vector. In half precision the basis of an iteration
    # would not stay orthogonal.
    drawn = torch.randn(like.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.to_dense().flatten() for part in parts])


def _split(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
