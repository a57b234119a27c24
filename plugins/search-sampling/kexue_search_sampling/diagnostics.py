"""How far draws can be trusted: split R-hat, effective sample size, autocorrelation.

The estimators are those of Vehtari, Gelman, Simpson, Carpenter and Bürkner, Rank-normalization,
folding, and localization: an improved R-hat, 2021, https://arxiv.org/abs/1903.08008, and agree with
ArviZ. All take ``[chain, draw]`` or ``[chain, draw, ...]`` and return one number per feature, in
float64; features are handled together, lags by the fast Fourier transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue.core import ArgumentError

__all__ = ["autocorrelation", "effective_sample_size", "split_r_hat", "summarize"]

_LEAST_DRAWS = 4


def autocorrelation(chains: Tensor) -> Tensor:
    """Return each chain's autocorrelation by lag.

    Args:
        chains: Shape ``[chain, draw, ...]``.

    Returns:
        Shape ``[chain, lag, ...]``, 1 at lag 0; NaN for a chain that never moves.
    """
    covariance = _autocovariance(_checked(chains))
    return covariance / covariance[:, :1]


def effective_sample_size(chains: Tensor, *, rank_normalized: bool = True) -> Tensor:
    """Return how many independent draws tell as much of the mean.

    Args:
        chains: Shape ``[chain, draw, ...]``.
        rank_normalized: Whether draws become normal scores first (the bulk of the distribution,
            whatever its tails), or stay as they are (the mean itself).

    Returns:
        Shape ``[...]``; NaN for fewer than four draws a chain, or where a draw is not finite.
    """
    draws = _checked(chains)
    if draws.shape[1] < _LEAST_DRAWS:
        return draws.new_full(draws.shape[2:], math.nan)
    halves = _split(draws)
    scored = _normal_scores(halves) if rank_normalized else halves
    return _masked(_effective(scored), draws)


def split_r_hat(chains: Tensor, *, rank_normalized: bool = True) -> Tensor:
    """Return the root of the variance of all chains over that within half-chains.

    Args:
        chains: Shape ``[chain, draw, ...]``.
        rank_normalized: Whether to take the greater of the values for normal scores of the draws
            and of their distances from the median, or that for the draws themselves.

    Returns:
        Shape ``[...]``, near 1 when the chains agree; above 1.01 they do not. NaN for fewer than
        four draws a chain, or where a draw is not finite.
    """
    draws = _checked(chains)
    if draws.shape[1] < _LEAST_DRAWS:
        return draws.new_full(draws.shape[2:], math.nan)
    halves = _split(draws)
    if not rank_normalized:
        return _masked(_r_hat(halves), draws)
    ordered = halves.flatten(0, 1).sort(0).values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    bulk = _r_hat(_normal_scores(halves))
    return _masked(torch.maximum(bulk, _r_hat(_normal_scores((halves - middle).abs()))), draws)


def summarize(chains: Tensor, seconds: float) -> dict[str, float]:
    """Return the greatest R-hat, the least effective sample size, and that per second.

    Args:
        chains: Shape ``[chain, draw, ...]``; with the padding of sequences taken as a class.
        seconds: How long the draws took.
    """
    if not chains.numel():
        return {"seconds": seconds}
    effective = float(effective_sample_size(chains).min())
    return {
        "r_hat": float(split_r_hat(chains).max()),
        "effective_sample_size": effective,
        "effective_per_second": effective / seconds if seconds else math.nan,
        "seconds": seconds,
    }


def _checked(chains: Tensor) -> Tensor:
    if chains.ndim < 2 or not chains.shape[0] or not chains.shape[1]:
        raise ArgumentError(
            f"`chains` must have shape [chain, draw, …], none of the first two empty. "
            f"Found {list(chains.shape)}.",
            argument="chains",
        )
    return chains.detach().double()


def _masked(found: Tensor, draws: Tensor) -> Tensor:
    return torch.where(draws.isfinite().all(0).all(0), found, math.nan)


def _split(draws: Tensor) -> Tensor:
    """Return both halves of each chain as chains; an odd draw in the middle is dropped."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _normal_scores(draws: Tensor) -> Tensor:
    """Return normal quantiles of the ranks among all draws of a feature; ties get their mean."""
    rows = draws.flatten(0, 1).flatten(1) if draws.ndim > 2 else draws.flatten()[:, None]
    rows = rows.T.contiguous()  # [feature, sample]
    ordered = rows.sort(-1).values
    below = torch.searchsorted(ordered, rows)
    not_above = torch.searchsorted(ordered, rows, right=True)
    rank = 0.5 * (below + not_above + 1).double()
    share = (rank - 3 / 8) / (rows.shape[1] + 1 / 4)
    scores: Tensor = torch.special.ndtri(share)
    return scores.T.reshape(draws.shape)


def _autocovariance(draws: Tensor) -> Tensor:
    """Return ``[chain, lag, ...]``, sums of products over the number of draws."""
    return _of_power(_power(draws), draws.shape[1])


def _mean_autocovariance(draws: Tensor) -> Tensor:
    """Return ``[lag, ...]``, the chains' mean; one inverse transform serves all."""
    return _of_power(_power(draws).mean(0, keepdim=True), draws.shape[1])[0]


def _power(draws: Tensor) -> Tensor:
    centred = draws - draws.mean(1, keepdim=True)
    spectrum: Tensor = torch.fft.rfft(centred, n=_padded(draws.shape[1]), dim=1)
    power: Tensor = spectrum.real.square() + spectrum.imag.square()
    return power


def _of_power(power: Tensor, length: int) -> Tensor:
    found: Tensor = torch.fft.irfft(power, n=_padded(length), dim=1)
    return found[:, :length] / length


def _padded(length: int) -> int:
    """Return a power of two that holds all lags without wrapping round."""
    return 1 << (2 * length - 1).bit_length()


def _r_hat(draws: Tensor) -> Tensor:
    length = draws.shape[1]
    between = length * draws.mean(1).var(0)
    within = draws.var(1).mean(0)
    return ((between / within + length - 1) / length).sqrt()


def _effective(draws: Tensor) -> Tensor:
    """Return the number of draws over their autocorrelation time, cut by Geyer's rule.

    Autocorrelations are summed in pairs ρ(2k) + ρ(2k + 1) while these are positive, each taken as
    no greater than the one before; of the first pair left out, ρ(2k) counts if it is positive.
    """
    chains, length = draws.shape[:2]
    covariance = _mean_autocovariance(draws)
    within = covariance[0] * length / (length - 1)
    total = covariance[0] + (draws.mean(1).var(0) if chains > 1 else 0.0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = max(0, (length - 3) // 2)  # the last lags are too noisy to count
    even = rho[0 : 2 * pairs + 1 : 2]
    sums = even[:pairs] + rho[1 : 2 * pairs : 2]
    kept = (sums >= 0).cumprod(0)
    first_left_out = even.gather(0, kept.sum(0, keepdim=True))[0]
    time = 2 * (sums.cummin(0).values * kept).sum(0) + first_left_out.clamp(min=0) - 1
    time = time.clamp(min=1 / math.log10(chains * length))
    same = draws.amax((0, 1)) == draws.amin((0, 1))
    return chains * length / torch.where(same, 1.0, time)
