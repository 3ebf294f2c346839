"""The Hessian ∇²L of a loss: products with it, its largest eigenvalue, and the same after projection by P."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcentral.diagnostics.batches import loss_of
from gradcentral.diagnostics.preserve import preserve_state
from gradcentral.layout import WeightLayout
from gradcentral.paper.gradients import Batch, Loss
from gradcentral.projection import center

__all__ = ["Eigenvalue", "hessian_matrix", "hessian_vector_product", "lanczos", "projected_norm", "top_eigenvalue"]

_P = TypeVar("_P", bound=Tensor)
_Multiply: TypeAlias = Callable[[Tensor], Tensor]


class Eigenvalue(NamedTuple):
    """An estimate of the eigenvalue of largest absolute value.

    Attributes:
        value: the eigenvalue λ, with its sign.
        residual: ‖Av − λv‖ for the unit vector v found with it; some eigenvalue of A is within this distance of λ.
        iterations: the number of products with A.
        converged: whether the residual is within the tolerance, and no eigenvalue can be larger at the other end.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def hessian_vector_product(model: Module, loss: Loss, batch: Batch, vector: Mapping[_P, Tensor]) -> dict[_P, Tensor]:
    """Compute ∇²L v exactly, for the Hessian over the parameters that are the keys of ``vector``.

    Args:
        model: runs in its current mode (dropout draws one mask); its gradients, its buffers and the random number
            generators are not changed.
        loss: ``loss(output, target)`` -> scalar.
        batch: ``(input, target)``, or a mapping, used as ``model(**batch)`` and ``loss(output, batch)``.
        vector: {parameter: its part of v, of the same shape}; the result has the same keys.

    Raises:
        ValueError: there is no parameter; one is not in the model or does not require a gradient; a part has
            another shape.
        TypeError: a parameter is complex; the batch is neither a pair nor a mapping.
        NotImplementedError: torch cannot differentiate a part of the model twice (``nn.EmbeddingBag``).

    Source: differentiation of the gradient along v, Pearlmutter 1994.

    Examples:
        L(w) = ½(3w₀² + w₁²):

        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.tensor([[3.0**0.5, 0.0], [0.0, 1.0]]), None)
        >>> v = {model.weight: torch.tensor([[1.0, 1.0]])}
        >>> product = hessian_vector_product(model, lambda output, _: output.square().sum() / 2, batch, v)
        >>> product[model.weight].round(decimals=4)
        tensor([[3., 1.]])
    """
    names = _checked(model, vector)
    for p, part in vector.items():
        if part.shape != p.shape:
            raise ValueError(f"vector: {names[p]} has shape {tuple(p.shape)}, its part {tuple(part.shape)}")
    with _hessian(model, loss, batch, [*names]) as multiply:
        products = _split(multiply(_flat(vector.values())), [*names])
    return {p: product.to(p.dtype) for p, product in zip(vector, products, strict=True)}


def hessian_matrix(
    model: Module,
    loss: Loss,
    batch: Batch,
    *,
    parameters: Iterable[Tensor] | None = None,
    elements: Sequence[int] | None = None,
) -> Tensor:
    """Compute ∇²L as a matrix, with one product per column, so for small networks or few elements.

    Args:
        model, loss, batch: as in `hessian_vector_product`, with the same errors.
        parameters: the parameters to differentiate by; by default all that require a gradient, in the model's order.
        elements: restrict the matrix to these elements, as indices into the flattened and concatenated parameters.

    Examples:
        >>> model, batch = torch.nn.Linear(2, 1), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
        >>> hessian_matrix(model, lambda output, target: (output - target).square().sum(), batch)
        tensor([[2., 4., 2.],
                [4., 8., 4.],
                [2., 4., 2.]])
    """
    chosen = [*_checked(model, parameters)]
    zero = torch.zeros_like(_flat(p.detach() for p in chosen))
    wanted = range(len(zero)) if elements is None else elements
    indices = torch.as_tensor(wanted, dtype=torch.int64, device=zero.device)
    with _hessian(model, loss, batch, chosen) as multiply:
        return torch.stack([multiply(zero.index_fill(0, index, 1))[indices] for index in indices])


def top_eigenvalue(
    model: Module,
    loss: Loss,
    batch: Batch,
    *,
    parameters: Iterable[Tensor] | None = None,
    layout: WeightLayout | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
) -> Eigenvalue:
    """Compute the eigenvalue of ∇²L, or of P∇²LP, of largest absolute value: the spectral norm, with a sign.

    P∇²LP is the curvature within the hyperplane that Gradient Centralization keeps the weights in; P∇²L has the same
    eigenvalues. P centers the parameters in the layout and leaves the others unchanged.

    Args:
        model, loss, batch, parameters: as in `hessian_matrix`, with the same errors.
        layout: project with this layout (P∇²LP); by default no projection (∇²L).
        tolerance: stop when the residual is at most ``tolerance·|λ|``.
        max_iterations: the maximum number of products; memory grows to this many copies of the parameters.

    Examples:
        >>> import gradcentral
        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
        >>> squares = lambda output, target: (output - target).square().sum()
        >>> round(top_eigenvalue(model, squares, batch).value, 4)
        10.0
        >>> round(top_eigenvalue(model, squares, batch, layout=gradcentral.weight_layout(model)).value, 4)
        1.0
    """
    chosen = [*_checked(model, parameters)]
    P = _projection(chosen, layout)
    with _hessian(model, loss, batch, chosen) as multiply:
        return lanczos(lambda v: P(multiply(P(v))), P(_start(chosen)), tolerance, max_iterations)


def projected_norm(
    model: Module, loss: Loss, batch: Batch, layout: WeightLayout, *, tolerance: float = 1e-3, max_iterations: int = 60
) -> Eigenvalue:
    """Compute ‖P∇²L‖, the spectral norm of the centered gradient's derivative.

    P∇²L is not symmetric; its norm is the square root of the top eigenvalue of (P∇²L)ᵀ(P∇²L) = ∇²L P ∇²L. The
    arguments are those of `top_eigenvalue`; each iteration takes two products with ∇²L.

    Source: ‖∇Φ(∇L)‖ of theorem 4.2, Yong et al. 2020.

    Examples:
        ∇²L = 2xxᵀ with x = (1, 2), so ‖P∇²L‖ = 2‖Px‖‖x‖ = √10:

        >>> import gradcentral
        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
        >>> squares = lambda output, target: (output - target).square().sum()
        >>> round(projected_norm(model, squares, batch, gradcentral.weight_layout(model)).value, 4)
        3.1623
    """
    chosen = [*_checked(model, None)]
    P = _projection(chosen, layout)
    with _hessian(model, loss, batch, chosen) as multiply:
        # The relative error of a square is twice that of the norm.
        square = lanczos(lambda v: multiply(P(multiply(v))), _start(chosen), 2 * tolerance, max_iterations)
    norm = math.sqrt(max(0.0, square.value))
    return square._replace(value=norm, residual=square.residual / norm if norm > 0 else square.residual)


def lanczos(multiply: _Multiply, start: Tensor, tolerance: float, max_iterations: int) -> Eigenvalue:
    """Compute the eigenvalue of largest absolute value of a symmetric matrix from products ``multiply``: v -> Av.

    This is Lanczos iteration with full reorthogonalization. The textbook version follows one end of the spectrum; this
    one continues until the other end cannot overtake it.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    length = float(start.norm())
    if length == 0:
        return Eigenvalue(0.0, 0.0, 0, converged=True)
    basis, diagonal, off_diagonal = [start / length], [], []
    while True:
        image = multiply(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):  # the second pass removes the rounding errors of the first
            for earlier in basis:
                image = image - (earlier @ image) * earlier
        off_diagonal.append(float(image.norm()))
        if not math.isfinite(diagonal[-1] + off_diagonal[-1]):
            return Eigenvalue(math.nan, math.nan, len(basis), converged=False)
        top, other = _spectrum_ends(diagonal, off_diagonal, tolerance)
        # If both ends of the spectrum are about as far from zero, the smaller one may converge first.
        converged = top.converged and (other.converged or abs(other.value) + other.residual <= abs(top.value))
        if converged or len(basis) in (max_iterations, len(start)):
            return top._replace(converged=converged)
        basis.append(image / off_diagonal[-1])


def _spectrum_ends(diagonal: list[float], off_diagonal: list[float], tolerance: float) -> list[Eigenvalue]:
    """Estimate both ends of the spectrum; return the one of larger absolute value first."""
    main, beside = (
        torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (diagonal, off_diagonal[:-1])
    )
    values, vectors = torch.linalg.eigh(torch.diag(main) + torch.diag(beside, -1))  # eigh reads the lower triangle
    ends = [(float(values[end]), off_diagonal[-1] * abs(float(vectors[-1, end]))) for end in (-1, 0)]
    found = [Eigenvalue(value, residual, len(main), residual <= tolerance * abs(value)) for value, residual in ends]
    return sorted(found, key=lambda end: -abs(end.value))


@contextmanager
def _hessian(model: Module, loss: Loss, batch: Batch, parameters: Sequence[Tensor]) -> Iterator[_Multiply]:
    """Yield v -> ∇²L v on flat vectors. The graph of the gradient is built once and traversed for each product."""
    # The fused attention kernels cannot be differentiated twice.
    with preserve_state(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss_of(model, loss, batch)
        gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        # An embedding table may have a sparse gradient. A gradient is constant if the loss is linear in its parameter.
        curved = {index: g.to_dense() for index, g in enumerate(gradients) if g.requires_grad}

        def multiply(vector: Tensor) -> Tensor:
            if not curved:
                return torch.zeros_like(vector)
            parts, graph = _split(vector, parameters), {"retain_graph": True, "materialize_grads": True}
            along = [parts[index].to(g.dtype) for index, g in curved.items()]
            return _flat(torch.autograd.grad([*curved.values()], parameters, along, **graph)).to(vector.dtype)

        yield multiply


def _projection(parameters: Sequence[Tensor], layout: WeightLayout | None) -> _Multiply:
    """Return P on flat vectors: Φ for the parameters in the layout, the identity for the others."""
    if layout is None:
        return lambda vector: vector
    if not any(p in layout for p in parameters):
        raise ValueError("layout: none of the parameters is centered; give weight_layout(model)")

    def project(vector: Tensor) -> Tensor:
        parts = zip(parameters, _split(vector, parameters), strict=True)
        return _flat(center(part, layout[p]) if p in layout else part for p, part in parts)

    return project


def _checked(model: Module, parameters: Iterable[Tensor] | None) -> dict[Tensor, str]:
    """Return the parameters to differentiate by, by default all that require a gradient, with their names."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    chosen = [p for p in names if p.requires_grad] if parameters is None else [*parameters]
    if not chosen:
        raise ValueError("parameters: empty; give at least one to differentiate by")
    for p in chosen:
        if p not in names:
            raise ValueError(f"parameters: a tensor of shape {tuple(p.shape)} is not a parameter of the model")
        if not p.requires_grad:
            raise ValueError(f"parameters: {names[p]} does not require a gradient; exclude it or call requires_grad_()")
        if p.is_complex():
            raise TypeError(f"parameters: {names[p]} is complex; the Hessian is implemented only for real parameters")
    return {p: names[p] for p in chosen}


def _start(parameters: Sequence[Tensor]) -> Tensor:
    """Sample a start vector on the CPU, the same for every device, without the global generators."""
    like = _flat(p.detach() for p in parameters)
    generator = torch.Generator("cpu").manual_seed(0)
    sample = torch.randn(like.numel(), generator=generator, dtype=torch.float64, device="cpu")
    # Half precision is not used, because the basis would not remain orthogonal.
    return sample.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.to_dense().flatten() for part in parts])


def _split(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
