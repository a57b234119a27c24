"""Metropolis-Hastings sampling.

From a point x a move to y is proposed by q(y | x) and accepted with probability
min(1, ρ(y) q(x | y) / (ρ(x) q(y | x))), else the chain stays. Its law tends to ρ, normalised, since
every pair of points exchanges as much as it gets (detailed balance). Use it where neither an easy
distribution near the target nor the conditionals of a feature are known.

Deviations: none in the kernel. The step of a random walk over real vectors is adapted while the
chains warm up, and fixed afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.core import Example, Sampler, Samples
from kexue.core.device import synchronized_clock
from kexue_search_sampling.adaptation import warm_up
from kexue_search_sampling.diagnostics import summarize
from kexue_search_sampling.edits import EditProposal
from kexue_search_sampling.proposals import GaussianProposal, Proposal, TableProposal
from kexue_search_sampling.settings import (
    check_num_samples,
    check_settings,
    check_start,
    chosen_chains,
)
from kexue_search_sampling.spaces import Problem, Reals, Sequences, resolve
from kexue_search_sampling.walk import Walk, check_support

__all__ = ["MetropolisHastings", "local_proposal"]


class MetropolisHastings(Sampler):
    """Chains of proposed moves, accepted by the Metropolis-Hastings rule.

    Real vectors move by a Gaussian random walk whose covariance and step size are learned while the
    chains warm up; classes of a table by replacing one; sequences of tokens by inserting, deleting
    and replacing one. All chains are rows of one tensor.

    Args:
        proposal: How chains move, instead.
        num_chains: Chains in parallel; None for one per hundred draws, from 4 to 4096.
        warmup: Steps before the first draw.
        thin: Steps from a draw to the next.
        step_size: Standard deviation of the random walk, the same in all directions; None to learn
            it with the covariance.
        temperature: τ; what is sampled is the target to the power of 1/τ.
        num_features: Features of a point, where the target does not say.
        init: Where chains start, shape ``[chain, feature]``; standard normal or uniform by default.
            Chains that are still where the density is zero halfway through the warm-up, or at its
            end, begin again where others are.
        diagnose: Whether to compute split R-hat and effective sample size, which sort all draws.

    Raises:
        ArgumentError: If an argument is out of its range, the target is not one, or returns NaN or
            +inf; if no chain finds a point of positive density.

    Example:
        >>> import torch
        >>> from kexue_search_sampling import MetropolisHastings
        >>> normal = lambda x: -0.5 * x.square().sum(-1)
        >>> sampler = MetropolisHastings(num_chains=500, num_features=2)
        >>> drawn = sampler.sample(normal, 20_000, generator=torch.Generator().manual_seed(0))
        >>> drawn.values.shape, drawn.chains.shape
        (torch.Size([20000, 2]), torch.Size([500, 40, 2]))
        >>> round(float(drawn.values.var()), 1)
        1.0

    Source: https://kexue.fm/archives/8062 and https://kexue.fm/archives/8084; Hastings, Monte Carlo
    sampling methods using Markov chains and their applications, 1970.
    """

    def __init__(
        self,
        proposal: Proposal | None = None,
        *,
        num_chains: int | None = None,
        warmup: int = 1000,
        thin: int = 1,
        step_size: float | None = None,
        temperature: float = 1.0,
        num_features: int | None = None,
        init: Tensor | None = None,
        diagnose: bool = True,
    ) -> None:
        check_settings(
            self, num_chains=num_chains, warmup=warmup, thin=thin, step_size=step_size,
            temperature=temperature,
        )  # fmt: skip
        self.proposal, self.num_chains, self.warmup, self.thin = proposal, num_chains, warmup, thin
        self.step_size, self.temperature = step_size, temperature
        self.num_features, self.init, self.diagnose = num_features, init, diagnose

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[class]``, or a table of them with an axis per variable; or a function
                from points ``[chain, feature]``, or from sequences ``[chain, time]`` of tokens with
                -1 behind the end, to log-densities ``[chain]`` in nats.
            num_samples: How many draws, of all chains together.
            generator: Source of randomness; the global one by default.

        Returns:
            Draws, with the chains; the diagnostics ``acceptance``, ``step_size`` where it was
            learned, ``r_hat`` (the greatest), ``effective_sample_size`` (the least, in bulk),
            ``seconds`` of the draws and ``effective_per_second``.
        """
        owner = type(self).__name__
        check_num_samples(num_samples, owner)
        problem = resolve(
            target, owner, num_features=self.num_features, init=self.init, generator=generator
        )
        num_chains = chosen_chains(self.num_chains, num_samples, self.init)
        start = check_start(self.init, problem, num_chains, owner, generator)
        proposal = self.proposal or local_proposal(problem, self.step_size or 1.0)
        walk = Walk(problem.log_prob, proposal, start, owner, generator)
        found: dict[str, float] = {}
        if self.proposal is None and self.step_size is None and isinstance(problem.space, Reals):
            walk.proposal, size = warm_up(walk, self.warmup, 1 / self.temperature)
            found["step_size"] = float(size)
        else:
            for half in (self.warmup // 2, self.warmup - self.warmup // 2):
                walk.run(half, inverse_temperature=1 / self.temperature)
                walk.restart_outside()
        if num_samples:
            check_support(walk.log_density, owner)
        length = -(-num_samples // num_chains)
        draws = walk.points.new_empty((length, *walk.points.shape))
        before = synchronized_clock(draws.device)
        acceptance = walk.run(
            length * self.thin,
            draws=draws,
            thin=self.thin,
            inverse_temperature=1 / self.temperature,
        )
        seconds = synchronized_clock(draws.device) - before
        values = problem.values(draws)
        chains = values.transpose(0, 1)
        diagnostics = {"acceptance": float(acceptance) if length else math.nan, **found}
        if self.diagnose:
            diagnostics |= summarize(chains, seconds)
        return Samples(values.flatten(0, 1)[:num_samples], diagnostics, chains=chains)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of five classes."""
        inputs = {"target": torch.randn(5, generator=generator), "num_samples": 400}
        return Example({"num_chains": 100, "warmup": 50, "thin": 5}, inputs)


def local_proposal(problem: Problem, step_size: float) -> Proposal:
    """Return the usual small moves of a space.

    Args:
        problem: What is sampled.
        step_size: Of the random walk, where the space is one of real vectors.
    """
    space = problem.space
    if isinstance(space, Reals):
        return GaussianProposal(step_size)
    if isinstance(space, Sequences):
        return EditProposal(space.num_tokens, space.max_length, min_length=space.min_length)
    return TableProposal(space.sizes)
