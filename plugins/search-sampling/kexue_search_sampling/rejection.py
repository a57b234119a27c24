"""Rejection sampling.

A draw x of an easy q is kept with probability α(x) = ρ(x) / (q(x) M), M an upper bound of ρ / q.
What is kept has the law of ρ, exactly and independently. To scale α down changes only the work. Use
it where q is near ρ; the share that is kept falls fast with the dimension.

Deviations: without ``log_bound``, M is the greatest ratio seen, and what had been kept is decided
again by the same random numbers whenever M grows. The law is then only as right as the greatest
ratio seen is near the supremum (Caffo, Booth and Davis, Empirical supremum rejection sampling,
2002).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue.core.errors import WorkError
from kexue_search_sampling.distributions import (
    Distribution,
    Uniform,
    as_distribution,
    default_distribution,
)
from kexue_search_sampling.settings import check_num_samples, check_settings
from kexue_search_sampling.spaces import Problem, Table, check_log_density, resolve

__all__ = ["Rejection"]


class Rejection(Sampler):
    """Draws of an easy distribution, of which some are kept so that the rest is the target's.

    Args:
        proposal: q: has ``sample(num, generator)`` and ``log_prob``, or is one of
            ``torch.distributions``. A t distribution around 0, or a uniform one, by default.
        log_bound: log M, an upper bound of log ρ(x) - log q(x); None for the exact one where the
            target is a table and q uniform, else for the greatest seen.
        scale: Of the default q over real vectors; rather too wide than too narrow.
        num_features: Features of a point, where the target does not say.
        batch_size: The most points drawn and scored at once.
        max_tries: Draws of q after which to give up.

    Raises:
        ArgumentError: If an argument is out of its range, the target is not one, or returns NaN or
            +inf; if a ratio exceeds ``log_bound``.
        WorkError: If too few draws are kept of ``max_tries``.

    Example:
        >>> import torch
        >>> from kexue_search_sampling import Rejection
        >>> drawn = Rejection().sample(torch.tensor([0.0, -torch.inf]), 4)
        >>> drawn.values, drawn.diagnostics["log_bound"] == torch.tensor(2.0).log()
        (tensor([0, 0, 0, 0]), tensor(True))

    Source: https://kexue.fm/archives/8062, section “拒绝采样”; von Neumann, 1951.
    """

    def __init__(
        self,
        proposal: Any = None,
        *,
        log_bound: float | None = None,
        scale: float = 3.0,
        num_features: int | None = None,
        batch_size: int = 2**16,
        max_tries: int = 10_000_000,
    ) -> None:
        check_settings(self, scale=scale, batch_size=batch_size, max_tries=max_tries)
        if log_bound is not None and not math.isfinite(log_bound):
            raise ArgumentError(
                f"`log_bound` of Rejection must be finite. Found {log_bound}.", argument="log_bound"
            )
        self.proposal, self.log_bound, self.scale = proposal, log_bound, scale
        self.num_features, self.batch_size, self.max_tries = num_features, batch_size, max_tries

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[class]``, or a table of them with an axis per variable; or a function
                from points ``[chain, feature]``, or from sequences ``[chain, time]`` of tokens with
                -1 behind the end, to log-densities ``[chain]`` in nats.
            num_samples: How many draws to keep.
            generator: Source of randomness; the global one by default.

        Returns:
            Independent draws; the diagnostics ``acceptance`` (kept of those tried), ``tries``,
            ``log_bound`` and ``max_log_ratio``, the greatest ratio seen.
        """
        owner = type(self).__name__
        check_num_samples(num_samples, owner)
        problem = resolve(target, owner, num_features=self.num_features, generator=generator)
        q = default_distribution(problem.space, self.scale)
        if self.proposal is not None:
            q = as_distribution(self.proposal, owner)
        sieve = _Sieve(problem, q, self._known_bound(problem, q), generator)
        while sieve.kept < num_samples:
            left = self.max_tries - sieve.tries
            if left <= 0:
                raise WorkError(
                    f"{owner} kept {sieve.kept} of {sieve.tries} draws, and {num_samples} were "
                    f"asked for. Give a `proposal` nearer to the target, or raise `max_tries`."
                )
            sieve.draw(min(left, self.batch_size, self._next(sieve, num_samples)))
        diagnostics = {
            "acceptance": sieve.kept / sieve.tries if sieve.tries else math.nan,
            "tries": float(sieve.tries),
            "log_bound": float(sieve.log_bound),
            "max_log_ratio": float(sieve.greatest),
        }
        return Samples(problem.values(sieve.points()[:num_samples]), diagnostics)

    def _known_bound(self, problem: Problem, q: Distribution) -> float | None:
        if self.log_bound is not None or problem.logits is None:
            return self.log_bound
        if isinstance(q, Uniform) and isinstance(q.space, Table):
            return float(problem.logits.max()) + q.space.log_size
        return None

    def _next(self, sieve: _Sieve, num_samples: int) -> int:
        """Return how many draws are likely to leave enough; at least so many as to learn it."""
        missing = num_samples - sieve.kept
        share = (sieve.kept + 1) / (sieve.tries + 1)
        return max(1000, math.ceil(1.1 * missing / share) if sieve.tries else 2 * missing)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of five classes."""
        return Example({}, {"target": torch.randn(5, generator=generator), "num_samples": 400})


class _Sieve:
    """What was kept, and what is needed to decide again under a greater bound.

    Args:
        problem: The target.
        q: What is drawn from.
        log_bound: log M; None for the greatest ratio seen.
        generator: Source of randomness.
    """

    def __init__(
        self,
        problem: Problem,
        q: Distribution,
        log_bound: float | None,
        generator: torch.Generator | None,
    ) -> None:
        self.problem, self.q, self.generator = problem, q, generator
        self.known = log_bound is not None
        self.log_bound = -math.inf if log_bound is None else log_bound
        self.greatest = -math.inf
        self.tries = self.kept = 0
        self._parts: list[tuple[Tensor, Tensor]] = []  # points, and the bound that drops each

    def draw(self, num: int) -> None:
        """Try some draws."""
        points = self.q.sample(num, self.generator)
        log_density = self.problem.log_prob(points)
        check_log_density(log_density, "Rejection", num)
        log_ratio = (log_density - self.q.log_prob(points)).double()
        self.greatest = max(self.greatest, float(log_ratio.max()))
        self._raise(log_ratio, points)
        log_uniform = log_ratio.new_empty(num).exponential_(generator=self.generator).neg_()
        self.tries += num
        self._keep(points, log_ratio - log_uniform)

    def points(self) -> Tensor:
        """Return what is kept, in the order of the draws."""
        return torch.cat(
            [points for points, _ in self._parts] or [self.q.sample(0, self.generator)]
        )

    def _keep(self, points: Tensor, limit: Tensor) -> None:
        """Keep ε ≤ ρ / (q M), that is log M ≤ log(ρ / q) - log ε."""
        kept = (limit >= self.log_bound) & (limit > -math.inf)
        self._parts.append((points[kept], limit[kept]))
        self.kept += int(kept.sum())

    def _raise(self, log_ratio: Tensor, points: Tensor) -> None:
        """Refuse a ratio above a given bound; raise the bound to it where none was given."""
        slack = 1e-6 * max(1.0, abs(self.log_bound)) if self.known else 0.0
        if self.greatest <= self.log_bound + slack:
            return
        if self.known:
            where = points[log_ratio.argmax()].flatten().tolist()[:8]
            raise ArgumentError(
                f"`log_bound` of Rejection must be at least the greatest log ρ(x) - log q(x). "
                f"Found {self.greatest:.6g} at {where}, above {self.log_bound:.6g}.",
                argument="log_bound",
            )
        self.log_bound = self.greatest
        parts, self._parts, self.kept = self._parts, [], 0
        for earlier, limit in parts:
            self._keep(earlier, limit)
