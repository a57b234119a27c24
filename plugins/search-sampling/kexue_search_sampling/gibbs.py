"""Gibbs sampling.

One place after another gets a new value, drawn from its distribution given all others. Such a draw
is a Metropolis-Hastings move that is always accepted. Use it where these conditionals are cheap:
few classes per place, or a model that knows them. It is slow where places depend strongly on each
other, since it changes one at a time.

Deviations: none. Places are visited in order, so that each kernel, not the whole sweep, is in
detailed balance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue.core.device import synchronized_clock
from kexue_search_sampling.diagnostics import summarize
from kexue_search_sampling.settings import (
    check_num_samples,
    check_settings,
    check_start,
    chosen_chains,
)
from kexue_search_sampling.spaces import (
    LogProb,
    Problem,
    Sequences,
    Table,
    batches,
    check_log_density,
    resolve,
)
from kexue_search_sampling.walk import check_support

__all__ = ["Gibbs", "conditional_of", "draw_classes"]

Conditional = Callable[[Tensor, int], Tensor]


class Gibbs(Sampler):
    """Sweeps over the places of a point, each drawn given all others.

    The target is a table of logits; or a function of sequences of one length, each token of which
    is drawn from scores of all its replacements; or a function of real vectors with a method
    ``draw_conditional(points, place, generator)``. A function of sequences may have
    ``conditional_logits(sequences, place)``, which is used instead of scoring all replacements.

    Args:
        num_chains: Chains in parallel; None for one per hundred draws, from 4 to 4096.
        warmup: Sweeps before the first draw.
        thin: Sweeps from a draw to the next.
        num_features: Features of a point, where the target does not say.
        init: Where chains start, shape ``[chain, feature]``; standard normal or uniform by default.
        batch_size: How many sequences are scored at once.
        diagnose: Whether to compute split R-hat and effective sample size, which sort all draws.

    Raises:
        ArgumentError: If an argument is out of its range, the target is not one, or returns NaN or
            +inf; if a chain finds no point of positive density.

    Example:
        >>> import torch
        >>> from kexue_search_sampling import Gibbs
        >>> table = torch.tensor([[0.1, 0.4], [0.3, 0.2]]).log()
        >>> drawn = Gibbs(num_chains=1000).sample(
        ...     table, 50_000, generator=torch.Generator().manual_seed(0)
        ... )
        >>> round(float((drawn.values == torch.tensor([0, 1])).all(1).double().mean()), 2)
        0.4

    Source: https://kexue.fm/archives/8062 and https://kexue.fm/archives/8084; Geman and Geman,
    Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images, 1984.
    """

    def __init__(
        self,
        *,
        num_chains: int | None = None,
        warmup: int = 100,
        thin: int = 1,
        num_features: int | None = None,
        init: Tensor | None = None,
        batch_size: int = 2**16,
        diagnose: bool = True,
    ) -> None:
        check_settings(self, num_chains=num_chains, warmup=warmup, thin=thin, batch_size=batch_size)
        self.num_chains, self.warmup, self.thin = num_chains, warmup, thin
        self.num_features, self.init, self.diagnose = num_features, init, diagnose
        self.batch_size = batch_size

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[class]``, or a table of them with an axis per variable; or a function
                from sequences ``[chain, time]``, or from points ``[chain, feature]`` whose
                conditionals are known, to log-densities ``[chain]`` in nats.
            num_samples: How many draws, of all chains together.
            generator: Source of randomness; the global one by default.

        Returns:
            Draws, with the chains; the diagnostics ``r_hat`` (the greatest),
            ``effective_sample_size`` (the least, in bulk), ``seconds`` of the draws and
            ``effective_per_second``.
        """
        owner = type(self).__name__
        check_num_samples(num_samples, owner)
        problem = resolve(
            target, owner, num_features=self.num_features, init=self.init, generator=generator
        )
        num_chains = chosen_chains(self.num_chains, num_samples, self.init)
        points = check_start(self.init, problem, num_chains, owner, generator).clone()
        sweep = _sweep_of(problem, owner, self.batch_size, generator)
        for _ in range(self.warmup):
            sweep(points)
        log_density = problem.log_prob(points)
        check_log_density(log_density, owner, num_chains)
        if num_samples:
            check_support(log_density, owner)
        draws = points.new_empty((-(-num_samples // num_chains), *points.shape))
        before = synchronized_clock(draws.device)
        for slot in draws:
            for _ in range(self.thin):
                sweep(points)
            slot.copy_(points)
        seconds = synchronized_clock(draws.device) - before
        values = problem.values(draws)
        chains = values.transpose(0, 1)
        diagnostics = summarize(chains, seconds) if self.diagnose else {}
        return Samples(values.flatten(0, 1)[:num_samples], diagnostics, chains=chains)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of five classes."""
        inputs = {"target": torch.randn(5, generator=generator), "num_samples": 400}
        return Example({"num_chains": 100, "warmup": 5}, inputs)


def _sweep_of(
    problem: Problem, owner: str, batch_size: int, generator: torch.Generator | None
) -> Callable[[Tensor], None]:
    """Return what draws every place of some points anew, in place."""
    draw = getattr(problem.target, "draw_conditional", None)
    if draw is not None:

        def exact(points: Tensor) -> None:
            for place in range(points.shape[1]):
                points[:, place] = draw(points, place, generator)

        return exact
    conditional = conditional_of(problem, owner, batch_size)

    def sweep(points: Tensor) -> None:
        for place in range(points.shape[1]):
            logits = conditional(points, place)
            check_log_density(logits, owner)
            points[:, place] = draw_classes(logits, generator)

    return sweep


def conditional_of(problem: Problem, owner: str, batch_size: int = 2**16) -> Conditional:
    """Return ``(points, place)`` to logits ``[chain, class]`` of that place given the others.

    Args:
        problem: The target.
        owner: Who asks, as errors name it.
        batch_size: How many sequences are scored at once.

    Raises:
        ArgumentError: If the target has no such conditionals.
    """
    space = problem.space
    if isinstance(space, Table) and problem.logits is not None:
        return _table_conditional(problem.logits)
    if not isinstance(space, Sequences):
        raise ArgumentError(
            f"`target` of {owner} must have conditionals: give logits, a function of sequences, or "
            f"one with `draw_conditional`. MetropolisHastings takes any function.",
            argument="target",
        )
    if space.min_length != space.max_length:
        raise ArgumentError(
            f"`target` of {owner} must be of sequences of one length, which it never changes. "
            f"Found {space.min_length} to {space.max_length}. MetropolisHastings changes it.",
            argument="target",
        )
    own = getattr(problem.target, "conditional_logits", None)
    if own is not None:
        found: Conditional = own
        return found
    return _scored_conditional(problem.log_prob, space.num_tokens, batch_size)


def _table_conditional(logits: Tensor) -> Conditional:
    sizes = logits.shape
    last = [logits.movedim(i, -1).reshape(-1, size) for i, size in enumerate(sizes)]
    strides = [
        torch.tensor(
            [0 if j == i else math.prod(s for k, s in enumerate(sizes[j + 1 :], j + 1) if k != i)
             for j in range(len(sizes))],
            device=logits.device,
        )
        for i in range(len(sizes))
    ]  # fmt: skip
    return lambda points, place: last[place][(points * strides[place]).sum(1)]


def _scored_conditional(log_prob: LogProb, num_tokens: int, batch_size: int) -> Conditional:
    def conditional(points: Tensor, place: int) -> Tensor:
        tokens = torch.arange(num_tokens, device=points.device)
        scores = []
        for part in batches(points, max(1, batch_size // num_tokens)):
            replaced = part[:, None].repeat(1, num_tokens, 1)
            replaced[:, :, place] = tokens
            scores.append(log_prob(replaced.flatten(0, 1)).view(len(part), num_tokens))
        return torch.cat(scores)

    return conditional


def draw_classes(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a class per row, in proportion to exp(logits); a row of -inf alone is uniform.

    Args:
        logits: Shape ``[row, class]``.
        generator: Source of randomness; the global one by default.
    """
    exact = logits.double()
    top = exact.amax(1, keepdim=True)
    mass = torch.where(top == -math.inf, 1.0, (exact - top).exp()).cumsum(1)
    uniform = torch.rand(
        (len(mass), 1), generator=generator, dtype=torch.float64, device=mass.device
    )
    drawn = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=mass.shape[1] - 1)
