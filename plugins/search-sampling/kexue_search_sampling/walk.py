"""Many Metropolis-Hastings chains in one tensor.

Random numbers are drawn for a block of steps at once, and nothing is read back from the device
within a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_search_sampling.proposals import Proposal
from kexue_search_sampling.spaces import LogProb, check_log_density

__all__ = ["Walk", "check_support", "log_acceptance"]

_BLOCK = 2**18  # points drawn for at once: the random numbers stay in the cache


def log_acceptance(
    log_new: Tensor, log_old: Tensor, correction: Tensor | None, inverse_temperature: float = 1.0
) -> Tensor:
    """Return the logarithm of the Metropolis-Hastings ratio, NaN between two densities of zero.

    A move is accepted with probability min(1, exp of it), and always where it is NaN, so that
    chains that start outside the support wander until they find it.

    Args:
        log_new: Log-densities of the proposed points ``[chain]``.
        log_old: Log-densities of the points.
        correction: log q(points | proposed) - log q(proposed | points); None for zero.
        inverse_temperature: 1 / τ: the target is raised to this power.
    """
    ratio = log_new - log_old
    if inverse_temperature != 1.0:
        ratio.mul_(inverse_temperature)
    return ratio if correction is None else ratio.add_(correction)


def check_support(log_density: Tensor, owner: str) -> None:
    """Refuse chains that have found no point of positive density.

    Raises:
        ArgumentError: If there is one.
    """
    outside = int((log_density == -math.inf).sum())
    if outside:
        raise ArgumentError(
            f"`init` of {owner} must lead the chains to points of positive density. Found none for "
            f"{outside} of {len(log_density)} chains; start them inside.",
            argument="init",
        )


class Walk:
    """Chains that take steps.

    Args:
        log_prob: The target, from points to log-densities ``[chain]``.
        proposal: How they move; may be exchanged between runs.
        points: Where they start, shape ``[chain, ...]``.
        owner: Who walks, as errors name it.
        generator: Source of randomness; the global one by default.

    Raises:
        ArgumentError: If the target does not return one log-density below +inf per chain.
    """

    def __init__(
        self,
        log_prob: LogProb,
        proposal: Proposal,
        points: Tensor,
        owner: str,
        generator: torch.Generator | None = None,
    ) -> None:
        self.log_prob, self.proposal = log_prob, proposal
        self.owner, self.generator = owner, generator
        self.points = points.clone()
        self.log_density = log_prob(points)
        check_log_density(self.log_density, owner, len(points))
        self._accepted = points.new_empty(len(points))

    def run(
        self,
        steps: int,
        *,
        draws: Tensor | None = None,
        thin: int = 1,
        inverse_temperature: float = 1.0,
        best: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Take steps.

        Args:
            steps: How many.
            draws: Gets the points after every ``thin``-th step, shape ``[draw, chain, ...]``.
            thin: See there.
            inverse_temperature: 1 / τ.
            best: Points and log-densities that are replaced wherever a chain comes to better ones.

        Returns:
            The accepted share of all moves, a tensor of one number.
        """
        slots = iter(() if draws is None else draws.unbind(0))
        block = max(1, min(steps, _BLOCK // max(1, self.points.numel())))
        moves = self.log_density.new_zeros(())
        for start in range(0, steps, block):
            size = min(block, steps - start)
            random = self.proposal.randomness(self.points, size, self.generator).unbind(0)
            log_uniform = self.log_density.new_empty(size, len(self.points))
            log_uniform.exponential_(generator=self.generator).neg_()
            rejected = torch.empty_like(log_uniform, dtype=torch.bool)
            seen = []
            rows = zip(random, log_uniform.unbind(0), rejected.unbind(0), strict=True)
            for step, row in enumerate(rows, start + 1):
                seen.append(self._step(*row, inverse_temperature))
                if draws is not None and step % thin == 0:
                    next(slots).copy_(self.points)
                if best is not None:
                    self._keep(*best)
            check_log_density(torch.stack(seen), self.owner)
            moves += rejected.numel() - rejected.sum()
        return moves / max(1, steps * len(self.points))

    def restart_outside(self) -> None:
        """Put chains of density zero where others are, at random; a walk may never come back."""
        inside = (self.log_density > -math.inf).nonzero()[:, 0]
        if not 0 < len(inside) < len(self.points):
            return
        shape = (len(self.points),)
        chosen = torch.rand(shape, generator=self.generator, device=self.points.device)
        others = inside[(chosen * len(inside)).long()]
        outside = self.log_density == -math.inf
        self.points[outside] = self.points[others][outside]
        self.log_density[outside] = self.log_density[others][outside]

    def _step(
        self, random: Tensor, log_uniform: Tensor, rejected: Tensor, inverse_temperature: float
    ) -> Tensor:
        """Move all chains once; return the log-densities that were proposed."""
        points, correction = self.proposal.propose(self.points, random)
        log_new = self.log_prob(points)
        ratio = log_acceptance(log_new, self.log_density, correction, inverse_temperature)
        torch.ge(log_uniform, ratio, out=rejected)  # false where the ratio is NaN
        self.log_density = torch.where(rejected, self.log_density, log_new)
        if self.proposal.additive:  # faster than to choose rows, and the same bits
            torch.logical_not(rejected, out=self._accepted)
            self.points.addcmul_(self._accepted[:, None], random)
        else:
            torch.where(rejected[:, None], self.points, points, out=self.points)
        return log_new

    def _keep(self, points: Tensor, log_density: Tensor) -> None:
        """Take over what is better than the best so far."""
        better = self.log_density > log_density
        torch.where(better, self.log_density, log_density, out=log_density)
        torch.where(better[:, None], self.points, points, out=points)
