"""The warm-up of a Gaussian random walk: covariance and step size from all chains together.

The warm-up is cut into windows that double in length. Within each, the step size follows the
acceptance rate by Robbins and Monro's rule; after each but the last, the shape of the step becomes
the chains' covariance. What comes out is fixed: a chain that went on adapting would not have the
target as its law.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue_search_sampling.proposals import GaussianProposal
from kexue_search_sampling.walk import Walk

__all__ = ["StepSize", "optimal_acceptance", "warm_up"]

_FIRST = 50  # steps of the first window
_BLOCK = 10  # steps between two changes of the step size


def optimal_acceptance(num_features: int) -> float:
    """Return the acceptance rate at which a random walk moves fastest: 0.44 to 0.234.

    Source: Roberts, Gelman and Gilks, 1997; Gelman, Roberts and Gilks, 1996.
    """
    return 0.234 + 0.206 / num_features


class StepSize:
    """The logarithm of a step size that follows an acceptance rate.

    Args:
        initial: Where it starts.
        wanted: The acceptance rate that it seeks.
        device: Where it is; it is never read back.
    """

    def __init__(self, initial: float, wanted: float, device: torch.device) -> None:
        self.log = torch.tensor(math.log(initial), dtype=torch.float64, device=device)
        self.wanted = wanted
        self.restart()

    def restart(self) -> None:
        """Take large steps again, since the shape of the walk has changed."""
        self.count = 0

    def update(self, acceptance: Tensor) -> None:
        """Follow an acceptance rate."""
        self.count += 1
        self.log += 2.0 * self.count**-0.6 * (acceptance - self.wanted)

    @property
    def value(self) -> Tensor:
        """The step size."""
        return self.log.exp()


def warm_up(
    walk: Walk, steps: int, inverse_temperature: float = 1.0
) -> tuple[GaussianProposal, Tensor]:
    """Walk for some steps, and return the proposal to go on with and its step size.

    Args:
        walk: Chains ``[chain, feature]``.
        steps: How many.
        inverse_temperature: 1 / τ.
    """
    chains, features = walk.points.shape
    size = StepSize(2.38 / math.sqrt(features), optimal_acceptance(features), walk.points.device)
    identity = torch.eye(features, dtype=walk.points.dtype, device=walk.points.device)
    factor = identity
    windows = _windows(steps)
    for number, window in enumerate(windows):
        size.restart()
        seen = []
        for start in range(0, window, _BLOCK):
            walk.proposal = GaussianProposal(factor * size.value.to(factor.dtype))
            taken = min(_BLOCK, window - start)
            size.update(walk.run(taken, inverse_temperature=inverse_temperature))
            seen.append(walk.points.clone())
        walk.restart_outside()
        if number < len(windows) - 1:
            factor = _factor(torch.stack(seen).flatten(0, 1), chains * window)
    return GaussianProposal(factor * size.value.to(factor.dtype)), size.value


def _windows(steps: int) -> list[int]:
    """Return windows of doubling length; the rest goes to the last."""
    windows, length = [], _FIRST
    while steps >= 3 * length:
        windows.append(length)
        steps -= length
        length *= 2
    return [*windows, steps] if steps else windows


def _factor(points: Tensor, steps: int) -> Tensor:
    """Return the Cholesky factor of the points' covariance, shrunk where there are few points.

    Args:
        points: Shape ``[point, feature]``.
        steps: Steps that all chains took together; a random walk in d dimensions forgets in some
            3 d of them.
    """
    exact = points.double()
    covariance = exact.T.cov().reshape(points.shape[1], points.shape[1])
    variances = covariance.diagonal().clamp(min=1e-12)
    features = points.shape[1]
    doubt = features / (features + steps / (3 * features))
    shrunk = (1 - doubt) * covariance + doubt * variances.diag()
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    return torch.where(failed == 0, factor, variances.sqrt().diag()).to(points.dtype)
