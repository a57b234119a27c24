"""Exact optimal transport of small problems: closed forms, assignment, network simplex.

The solvers work on the CPU in float64, whatever device and dtype the tensors have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.errors import ArgumentError, WorkError

__all__ = ["check_problem", "network_simplex", "optimal_cost", "transport", "transport_plan"]

Array = NDArray[np.float64]

_OPTIMAL = 1  # POT's code
_MAX_ITERATIONS = 100_000_000
_SUM_TOLERANCE = 1e-5  # float32 masses of some thousand words sum to 1 no better


class Solution(NamedTuple):
    """An optimal plan, its cost, and the potentials that prove it optimal.

    Args:
        cost: The sum of plan × cost.
        plan: Shape ``[n, m]``: how much of i goes to j.
        f: Shape ``[n]``: what a little more mass at i would cost.
        g: Shape ``[m]``: the same at j; f_i + g_j <= cost_ij.
    """

    cost: float
    plan: Array
    f: Array
    g: Array


def network_simplex(p: Array, q: Array, cost: Array) -> Solution:
    """Solve one problem with POT's network simplex, called without its wrapper.

    The wrapper's checks cost more than a problem of ten words; what they ask holds here.

    Args:
        p: Shape ``[n]``, non-negative, sums to 1.
        q: Shape ``[m]``, likewise.
        cost: Shape ``[n, m]``, finite, contiguous.

    Raises:
        WorkError: If the solver does not end with an optimum.
    """
    if _is_at_rest(p, q, cost):
        return Solution(0.0, np.diag(p), np.zeros_like(p), np.zeros_like(q))
    from ot.lp.emd_wrap import emd_c  # type: ignore[import-untyped]

    plan, total, f, g, code = emd_c(p, q, cost, _MAX_ITERATIONS, 1)
    if code != _OPTIMAL:
        raise WorkError(
            f"POT's network simplex found no optimum for {len(p)} × {len(q)} words (code {code})."
        )
    return Solution(float(total), plan, f, g)


def optimal_cost(p: Array, q: Array, cost: Array) -> float:
    """Return the least cost of transport alone, by the fastest exact way.

    Args:
        p: Shape ``[n]``, positive, sums to 1.
        q: Shape ``[m]``, likewise.
        cost: Shape ``[n, m]``, finite, contiguous.
    """
    if len(p) == 1 or len(q) == 1:  # all there is goes to, or comes from, one place
        return float(p @ cost @ q)
    if len(p) == len(q) and _all_equal(p) and _all_equal(q):
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        return float(cost[linear_sum_assignment(cost)].mean())
    return network_simplex(p, q, cost).cost


def _is_at_rest(p: Array, q: Array, cost: Array) -> bool:
    """Whether both are the same masses at the same places: then the cost is 0, not 1e-17."""
    if len(p) != len(q) or cost.diagonal().any():
        return False
    return bool((p == q).all() and cost.min() >= 0)


def _all_equal(p: Array) -> bool:
    return bool(p[0] == p[-1] and (p == p[0]).all())


class _Transport(torch.autograd.Function):
    """The least cost of each problem of a batch, with its gradient by the envelope theorem."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
        found = [_solve(*problem) for problem in zip(*map(_to_numpy, (p, q, cost)), strict=True)]
        parts = {
            "plan": np.stack([s.plan for s in found]) if found else np.zeros(cost.shape),
            "f": np.stack([s.f for s in found]) if found else np.zeros(p.shape),
            "g": np.stack([s.g for s in found]) if found else np.zeros(q.shape),
        }
        ctx.save_for_backward(*(torch.from_numpy(part).to(cost) for part in parts.values()))
        return torch.tensor([s.cost for s in found], dtype=torch.float64).to(cost)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan, f, g = ctx.saved_tensors
        (grad,) = grads
        return grad[:, None] * f, grad[:, None] * g, grad[:, None, None] * plan


def _to_numpy(tensor: Tensor) -> Array:
    array: Array = np.ascontiguousarray(tensor.detach().cpu().double().numpy())
    return array


def _solve(p: Array, q: Array, cost: Array) -> Solution:
    """Solve one problem whose masses may hold zeros, with potentials for these too."""
    found = network_simplex(p / p.sum(), q / q.sum(), cost)
    f, g = found.f.copy(), found.g.copy()
    f[p == 0] = (cost[p == 0] - g)[:, q > 0].min(axis=1)
    g[q == 0] = (cost[:, q == 0] - f[:, None]).min(axis=0)
    return found._replace(f=f, g=g)


def transport(
    p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch m"], cost: Float[Tensor, "*batch n m"]
) -> Tensor:
    """Return the least cost of bringing masses ``p`` to ``q``: the earth mover's distance.

    min sum_ij P_ij cost_ij over P >= 0 with row sums p and column sums q (post 7388, eq. 2).
    Exact, by the network simplex. Differentiable: the gradient for ``cost`` is the optimal plan,
    those for ``p`` and ``q`` are the dual potentials, which are determined up to a constant each;
    where several optima exist it is one of the subgradients.

    Args:
        p: Masses, non-negative, sum 1 in each row (within 1e-5). Zeros are padding.
        q: Masses, likewise.
        cost: Finite costs.

    Returns:
        Shape ``[*batch]``, in the dtype of ``cost``; float32 for half precision.

    Raises:
        ArgumentError: If shapes do not fit, a mass is negative or not finite, a row does not sum
            to 1, or a cost is not finite.

    Example:
        >>> import torch
        >>> from kexue_wrd import transport
        >>> cost = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0]])
        >>> transport(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25, 0.5]), cost)
        tensor(0.7500)
    """
    p, q, cost = check_problem(p, q, cost)
    batch = cost.shape[:-2]
    rows = [t.reshape(-1, *t.shape[len(batch) :]) for t in (p, q, cost)]
    total: Tensor = _Transport.apply(*rows)  # type: ignore[no-untyped-call]
    return total.reshape(batch)


def transport_plan(
    p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch m"], cost: Float[Tensor, "*batch n m"]
) -> Tensor:
    """Return an optimal plan, ``[*batch, n, m]``; arguments and errors as in :func:`transport`."""
    p, q, cost = (tensor.detach() for tensor in check_problem(p, q, cost))
    flat = [t.reshape(-1, *t.shape[cost.ndim - 2 :]) for t in (p, q, cost)]
    plans = [_solve(*problem).plan for problem in zip(*map(_to_numpy, flat), strict=True)]
    return (
        torch.from_numpy(np.stack(plans) if plans else np.zeros(cost.shape)).to(cost).view_as(cost)
    )


def check_problem(p: Tensor, q: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Refuse what is no transport problem; return it in one dtype, half precision in float32."""
    for name, tensor in (("p", p), ("q", q), ("cost", cost)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(
                f"`{name}` must be a floating-point tensor. Found {kind}.", argument=name
            )
        if not torch.isfinite(tensor).all():
            at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ArgumentError(
                f"`{name}` must be finite. Found {tensor[tuple(at)].item()} at {at}.", argument=name
            )
    if (
        p.ndim < 1
        or q.ndim < 1
        or cost.shape != (*p.shape, q.shape[-1])
        or not cost.shape[-2:].numel()
    ):
        raise ArgumentError(
            f"`cost` must have shape [..., n, m] for `p` [..., n] and `q` [..., m], n and m at "
            f"least 1. Found {list(cost.shape)}, {list(p.shape)} and {list(q.shape)}.",
            argument="cost",
        )
    if q.shape[:-1] != p.shape[:-1]:
        raise ArgumentError(
            f"`q` must have the leading axes of `p`, {list(p.shape[:-1])}. "
            f"Found {list(q.shape[:-1])}.",
            argument="q",
        )
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), cost.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    _check_masses("p", p)
    _check_masses("q", q)
    return p.to(dtype), q.to(dtype), cost.to(dtype)


def _check_masses(name: str, masses: Tensor) -> None:
    totals = masses.detach().double().sum(-1)
    if (masses < 0).any():
        raise ArgumentError(
            f"`{name}` must not be negative. Found {masses.min().item():g}.", argument=name
        )
    wrong = totals[(totals - 1).abs() > _SUM_TOLERANCE]
    if wrong.numel():
        raise ArgumentError(
            f"`{name}` must sum to 1 in each row. Found {wrong[0].item():.6g}; divide by the sum.",
            argument=name,
        )
