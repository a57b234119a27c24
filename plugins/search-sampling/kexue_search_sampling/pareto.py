"""The Pareto k of importance weights: how heavy their tail is.

A generalised Pareto distribution is fitted to the largest weights as Zhang and Stephens do in A new
and efficient estimation method for the generalized Pareto distribution, 2009, with the prior of
Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, 2024,
https://arxiv.org/abs/1507.02646. Above 1/2 the weights have no variance, above 1 no mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue.core import ArgumentError

__all__ = ["pareto_k"]

_LEAST_TAIL = 5
_PRIOR_COUNT, _PRIOR_K = 10, 0.5


def pareto_k(log_weights: Tensor) -> Tensor:
    """Return the shape k of the tail of some weights.

    Args:
        log_weights: Logarithms of the weights up to a constant, shape ``[sample]``; -inf is zero.

    Returns:
        One number; estimates are unreliable above 0.7. +inf where there is no tail to fit.
    """
    if log_weights.ndim != 1 or not (log_weights < math.inf).all():
        raise ArgumentError(
            f"`log_weights` must have shape [sample], without NaN or +inf. Found shape "
            f"{list(log_weights.shape)}.",
            argument="log_weights",
        )
    scaled = log_weights.detach().double()
    count = len(scaled)
    if not count or scaled.max() == -math.inf:
        return scaled.new_tensor(math.inf)
    ordered = (scaled - scaled.max()).sort().values
    length = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    smallest = math.log(torch.finfo(torch.float64).tiny)
    cut = max(float(ordered[-min(length + 1, count)]), smallest)
    tail = ordered[ordered > cut].exp() - math.exp(cut)
    return _shape(tail) if len(tail) >= _LEAST_TAIL else scaled.new_tensor(math.inf)


def _shape(tail: Tensor) -> Tensor:
    """Return the posterior mean of k, from exceedances in ascending order."""
    count = len(tail)
    grid = 30 + int(math.sqrt(count))
    steps = torch.arange(1, grid + 1, dtype=tail.dtype, device=tail.device)
    quartile = tail[int(count / 4 + 0.5) - 1]
    b = (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile) + 1 / tail[-1]
    k = torch.log1p(-b[:, None] * tail).mean(1)
    log_likelihood = count * ((-b / k).log() - k - 1)
    weights = log_likelihood.softmax(0)
    mean = (weights * b).sum() / weights.sum()
    found = torch.log1p(-mean * tail).mean()
    return (count * found + _PRIOR_COUNT * _PRIOR_K) / (count + _PRIOR_COUNT)
