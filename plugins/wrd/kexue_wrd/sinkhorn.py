"""Entropic transport in batches on the device, with an interval that holds the exact cost."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_wrd.transport import check_problem

__all__ = ["SinkhornResult", "sinkhorn"]


class SinkhornResult(NamedTuple):
    """What Sinkhorn's iterations found.

    Args:
        cost: Shape ``[*batch]``: the cost of a feasible plan, never below the exact one.
        lower: Shape ``[*batch]``: the value of feasible potentials, never above the exact one.
    """

    cost: Tensor
    lower: Tensor

    @property
    def error(self) -> Tensor:
        """How far ``cost`` can be from the exact cost at most, ``[*batch]``."""
        return self.cost - self.lower


@torch.no_grad()
def sinkhorn(
    p: Float[Tensor, "*batch n"],
    q: Float[Tensor, "*batch m"],
    cost: Float[Tensor, "*batch n m"],
    *,
    regularization: float = 0.02,
    iterations: int = 100,
) -> SinkhornResult:
    """Approximate :func:`transport` for many problems at once, and say how well.

    Sinkhorn's iterations in the log domain (Cuturi 2013) while the temperature falls to
    ``regularization`` × the mean cost. The plan is then rounded to a feasible one (Altschuler et
    al. 2017, algorithm 2) and the potentials are made feasible, so that the exact cost lies
    between ``lower`` and ``cost``. All is tensor operations on the device of ``cost``; there is no
    gradient.

    Args:
        p: Masses, non-negative, sum 1 in each row (within 1e-5). Zeros are padding.
        q: Masses, likewise.
        cost: Finite costs; what stands at padding does not count.
        regularization: The last temperature, as a share of the mean cost: smaller is nearer, and
            needs more iterations.
        iterations: How many.

    Returns:
        Both ends of the interval, in the dtype of ``cost``; float32 for half precision.

    Raises:
        ArgumentError: As :func:`transport`; or if ``regularization`` is not positive or
            ``iterations`` is not at least 1.

    Example:
        >>> import torch
        >>> from kexue_wrd import sinkhorn
        >>> cost = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0]])
        >>> found = sinkhorn(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25, 0.5]), cost)
        >>> bool(found.lower <= 0.75 + 1e-6) and bool(found.cost >= 0.75 - 1e-6)
        True
    """
    if not regularization > 0:
        raise ArgumentError(
            f"`regularization` must be positive. Found {regularization!r}.",
            argument="regularization",
        )
    if iterations < 1:
        raise ArgumentError(
            f"`iterations` must be at least 1. Found {iterations!r}.", argument="iterations"
        )
    p, q, cost = check_problem(p, q, cost)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    plan, f = _iterate(p, q, cost, regularization, iterations)
    return SinkhornResult((_rounded(plan, p, q) * cost).sum((-2, -1)), _dual_value(f, p, q, cost))


def _iterate(
    p: Tensor, q: Tensor, cost: Tensor, regularization: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the last plan and the potential f of the rows."""
    log_p, log_q = p.log(), q.log()
    mean = (p[..., None] * cost * q[..., None, :]).sum((-2, -1), keepdim=True)
    mean = mean.abs().clamp(min=torch.finfo(cost.dtype).tiny ** 0.5)
    f, g = torch.zeros_like(p), torch.zeros_like(q)
    for i in range(iterations):
        fallen = min(1.0, 2 * i / iterations)  # the second half stays at the last temperature
        temperature = mean * regularization**fallen
        t = temperature[..., 0]
        g = t * (log_q - ((f[..., None] - cost) / temperature).logsumexp(-2))
        f = t * (log_p - ((g[..., None, :] - cost) / temperature).logsumexp(-1))
    return ((f[..., None] + g[..., None, :] - cost) / temperature).exp(), f


def _rounded(plan: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return a plan nearby whose sums are p and q."""
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (p / plan.sum(-1).clamp(min=tiny)).clamp(max=1)[..., None]
    plan = plan * (q / plan.sum(-2).clamp(min=tiny)).clamp(max=1)[..., None, :]
    rows, columns = (p - plan.sum(-1)).clamp(min=0), (q - plan.sum(-2)).clamp(min=0)
    left = rows.sum(-1).clamp(min=tiny)[..., None, None]
    return plan + rows[..., None] * columns[..., None, :] / left


def _dual_value(f: Tensor, p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    """Return the value of f and of the best g that is feasible with it, then of the best f."""
    inf = torch.inf
    f = f.masked_fill(p == 0, -inf)
    g = (cost - f[..., None]).amin(-2).masked_fill(q == 0, -inf)
    f = (cost - g[..., None, :]).amin(-1)
    return (p * f).sum(-1) + (q * g.masked_fill(q == 0, 0)).sum(-1)
