"""The iterative pseudo-inverse of the paper, by matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kexue.core.errors import ArgumentError
from kexue_nystromformer.checks import check_count, is_plain, without_autocast

__all__ = [
    "inverse_gradient",
    "iterate",
    "iterate_stochastic",
    "pseudo_inverse",
    "recorded_steps",
]


def pseudo_inverse(
    matrix: Float[Tensor, "*batch row column"], iterations: int = 6
) -> Float[Tensor, "*batch column row"]:
    """Return an approximation of the Moore-Penrose inverse that converges to it.

    With V₀ = Aᵀ / (‖A‖₁ ‖A‖∞), n times

    V ← ¼ V (13 I − A V (15 I − A V (7 I − A V))).

    After few iterations small singular values are not inverted but damped. For the attention
    matrices that it is meant for this is a regulariser: the limit can be far worse.

    Args:
        matrix: A, any finite numbers. Each matrix of the batch is scaled by its own norms.
        iterations: n, at least 0; the paper takes 6. Near the limit each one cubes the error.

    Raises:
        ArgumentError: If ``matrix`` has fewer than two axes or is not floating-point, or
            ``iterations`` is negative.

    Example:
        >>> import torch
        >>> from kexue_nystromformer import pseudo_inverse
        >>> pseudo_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), 12)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ArgumentError(
            f"`matrix` of pseudo_inverse must be floating-point [..., row, column]. "
            f"Found {matrix.dtype} of shape {list(matrix.shape)}.",
            argument="matrix",
        )
    check_count("pseudo_inverse", "iterations", iterations, least=0)
    *batch, rows, columns = matrix.shape
    size = torch.Size(batch).numel()
    return iterate(matrix.reshape(size, rows, columns), iterations).view(*batch, columns, rows)


def iterate(matrix: Tensor, iterations: int) -> Tensor:
    """Return the pseudo-inverses of ``[batch, row, column]``; see :func:`pseudo_inverse`."""
    size = matrix.abs()
    norms = size.sum(-2).amax(-1) * size.sum(-1).amax(-1)  # ‖A‖₁ ‖A‖∞
    tiny = torch.finfo(matrix.dtype).tiny
    inverse = matrix.mT / norms.clamp(min=tiny)[:, None, None]
    for _ in range(iterations):
        inverse = _step(matrix, inverse)[-1]
    return inverse


def _step(matrix: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P = A V, 7 P − P P, 15 P − P (7 P − P P), and the next V.

    P is formed anew each time: recursions for I − A V save products, but let rounding errors grow
    by 13/4 per iteration where A is singular.
    """
    product = torch.bmm(matrix, inverse)
    inner = torch.baddbmm(product, product, product, beta=7, alpha=-1)
    outer = torch.baddbmm(product, product, inner, beta=15, alpha=-1)
    return product, inner, outer, torch.baddbmm(inverse, inverse, outer, beta=13 / 4, alpha=-1 / 4)


def iterate_stochastic(matrix: Tensor, iterations: int) -> Tensor:
    """Return what :func:`iterate` does, of matrices whose rows are probabilities; in less time.

    Their ‖A‖∞ is 1. The gradient is written out, and cannot be differentiated in its turn.
    """
    if matrix.requires_grad and torch.is_grad_enabled() and is_plain(matrix):
        inverse: Tensor = _Recorded.apply(matrix, iterations)  # type: ignore[no-untyped-call]
        return inverse
    inverse = _first(matrix, matrix.sum(-2).amax(-1, keepdim=True))
    for _ in range(iterations):
        inverse = _step(matrix, inverse)[-1]
    return inverse


def solve_stochastic(matrix: Tensor, iterations: int, right: Tensor) -> Tensor:
    """Return :func:`iterate_stochastic` times what stands to its right.

    Where that has fewer columns than the matrix, the last step is applied to it and never formed:
    one product of matrices instead of four.
    """
    if not iterations or right.shape[-1] >= matrix.shape[-1]:
        return torch.bmm(iterate_stochastic(matrix, iterations), right)
    inverse = iterate_stochastic(matrix, iterations - 1)
    product = torch.bmm(matrix, inverse)
    first = torch.bmm(product, right)
    inner = torch.baddbmm(first, product, first, beta=7, alpha=-1)
    outer = torch.baddbmm(first, product, inner, beta=15, alpha=-1)
    return torch.bmm(inverse, torch.add(13 / 4 * right, outer, alpha=-1 / 4))


def _first(matrix: Tensor, norms: Tensor) -> Tensor:
    """Return Aᵀ / ‖A‖₁, contiguous: a transposed factor at the right takes twice as long."""
    return matrix.mT.clone(memory_format=torch.contiguous_format).div_(norms[..., None])


def recorded_steps(matrix: Tensor, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Return what :func:`iterate_stochastic` returns, and what its gradient needs."""
    norms, largest = matrix.sum(-2).max(-1, keepdim=True)  # ‖A‖₁, and which column has it
    inverse = _first(matrix, norms)
    steps = [matrix, norms, largest]
    for _ in range(iterations):
        product, inner, outer, following = _step(matrix, inverse)
        steps += [inverse, product, inner, outer]
        inverse = following
    return inverse, steps


def inverse_gradient(steps: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return the gradient of the matrices, from that of their inverses.

    With G the gradient of the next V, each line read from what the step returned, and G and all
    that is called d transposed, so that no factor is: at the right, that takes twice as long::

        V' = 13/4 V − V O / 4        dV = 13/4 G − O G / 4         dO = −G V / 4
        O = 15 P − P I               dP = 15 dO − I dO             dI = −dO P
        I = 7 P − P P                dP += 7 dI − P dI − dI P
        P = A V                      dA += V dP                    dV += dP A

    Args:
        steps: From :func:`recorded_steps`.
        gradient: Of the inverses.
    """
    matrix, norms, largest, *steps = steps
    total = torch.zeros_like(matrix)
    flow = gradient.mT.contiguous()
    for start in reversed(range(0, len(steps), 4)):
        inverse, product, inner, outer = steps[start : start + 4]
        d_outer = torch.baddbmm(flow, flow, inverse, beta=0, alpha=-1 / 4)
        d_inner = torch.baddbmm(flow, d_outer, product, beta=0, alpha=-1)
        d_product = torch.baddbmm(d_outer, inner, d_outer, beta=15, alpha=-1)
        d_product.add_(d_inner, alpha=7)
        d_product.baddbmm_(product, d_inner, alpha=-1)
        d_product.baddbmm_(d_inner, product, alpha=-1)
        total.baddbmm_(inverse, d_product)
        flow = torch.baddbmm(flow, outer, flow, beta=13 / 4, alpha=-1 / 4)
        flow.baddbmm_(d_product, matrix)
    # V₀ = Aᵀ / ‖A‖₁, and the norm is the sum of a column
    inner_product = (flow * matrix).sum((-2, -1)) / norms[:, 0] ** 2
    total = total.mT + flow / norms[..., None]
    column = largest[:, None, :].expand(-1, matrix.shape[-2], 1)
    return total.scatter_add_(-1, column, -inner_product[:, None, None].expand_as(column))


class _Recorded(torch.autograd.Function):
    """The iteration, which adds its gradients up in place."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, iterations: int) -> Tensor:
        inverse, steps = recorded_steps(matrix, iterations)
        ctx.save_for_backward(*steps)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with without_autocast(gradient.device.type):  # as forward was
            return inverse_gradient(ctx.saved_tensors, gradient), None
