"""The iterative pseudo-inverse of the paper, by matrix products alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_nystromformer.checks import check_count

__all__ = ["iterate", "pseudo_inverse"]


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
        # The product is formed anew each time: recursions for I − A V save multiplications, but
        # let rounding errors grow by 13/4 per iteration where A is singular.
        product = torch.bmm(matrix, inverse)  # A V
        factor = torch.baddbmm(product, product, product, beta=7, alpha=-1)
        factor = torch.baddbmm(product, product, factor, beta=15, alpha=-1)
        inverse = torch.baddbmm(inverse, inverse, factor, beta=13 / 4, alpha=-1 / 4)
    return inverse
