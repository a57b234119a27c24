"""Importance sampling.

Draws of an easy q stand for draws of ρ, each with a weight in proportion to ρ(x) / q(x):
E_p[f] ≈ Σ w_i f(x_i) / Σ w_i, whatever ρ sums to. Use it for expectations, and for the normaliser
of ρ. It fails where q is far from ρ, quietly if q is too narrow: the Pareto k above 0.7 says so.

Deviations: none; weights are computed from differences of logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue_search_sampling.distributions import as_distribution, default_distribution
from kexue_search_sampling.pareto import pareto_k
from kexue_search_sampling.settings import check_num_samples, check_settings
from kexue_search_sampling.spaces import batches, check_log_density, resolve

__all__ = ["Importance", "expectation", "resample"]


class Importance(Sampler):
    """Weighted draws of a distribution that is easy to draw from.

    Args:
        proposal: q: has ``sample(num, generator)`` and ``log_prob``, or is one of
            ``torch.distributions``. A t distribution around 0, or a uniform one, by default.
        scale: Of the default q over real vectors; rather too wide than too narrow.
        num_features: Features of a point, where the target does not say.
        batch_size: Points scored at once.

    Raises:
        ArgumentError: If an argument is out of its range, the target is not one, or returns NaN or
            +inf; if all draws have density zero.

    Example:
        >>> import torch
        >>> from kexue_search_sampling import Importance, expectation
        >>> target = lambda x: -0.5 * (x[:, 0] - 1).square()
        >>> drawn = Importance(num_features=1).sample(
        ...     target, 100_000, generator=torch.Generator().manual_seed(0)
        ... )
        >>> mean, error = expectation(drawn, lambda x: x[:, 0])
        >>> round(float(mean), 1), bool(error < 0.01)
        (1.0, True)

    Source: https://kexue.fm/archives/8062, section “重要采样”.
    """

    def __init__(
        self,
        proposal: Any = None,
        *,
        scale: float = 3.0,
        num_features: int | None = None,
        batch_size: int = 2**16,
    ) -> None:
        check_settings(self, scale=scale, batch_size=batch_size)
        self.proposal, self.scale = proposal, scale
        self.num_features, self.batch_size = num_features, batch_size

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[class]``, or a table of them with an axis per variable; or a function
                from points ``[chain, feature]``, or from sequences ``[chain, time]`` of tokens with
                -1 behind the end, to log-densities ``[chain]`` in nats.
            num_samples: How many draws of q.
            generator: Source of randomness; the global one by default.

        Returns:
            Draws of q and their weights; the diagnostics ``effective_sample_size`` = 1 / Σ w²,
            ``log_normalizer``, the logarithm of what ρ sums to, and ``pareto_k`` of the weights.
        """
        owner = type(self).__name__
        check_num_samples(num_samples, owner)
        problem = resolve(target, owner, num_features=self.num_features, generator=generator)
        q = default_distribution(problem.space, self.scale)
        if self.proposal is not None:
            q = as_distribution(self.proposal, owner)
        points = q.sample(num_samples, generator)
        ratios = []
        for part in batches(points, self.batch_size):
            log_density = problem.log_prob(part)
            check_log_density(log_density, owner, len(part))
            ratios.append((log_density - q.log_prob(part)).double())
        values = problem.values(points)
        if not num_samples:
            return Samples(values, weights=points.new_zeros(0, dtype=torch.float64))
        log_ratio = torch.cat(ratios)
        total = log_ratio.logsumexp(0)
        if total == -math.inf:
            raise ArgumentError(
                f"`target` of {owner} must be positive somewhere that q reaches. Found density "
                f"zero at all {num_samples} draws.",
                argument="target",
            )
        weights = (log_ratio - total).exp()
        diagnostics = {
            "effective_sample_size": float(1 / weights.square().sum()),
            "log_normalizer": float(total) - math.log(num_samples),
            "pareto_k": float(pareto_k(log_ratio)),
        }
        return Samples(values, diagnostics, weights=weights)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of five classes."""
        return Example({}, {"target": torch.randn(5, generator=generator), "num_samples": 400})


def expectation(samples: Samples, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of a function under the target, and its standard error.

    Args:
        samples: Independent draws, with weights or without.
        function: From points ``[sample, ...]`` to values ``[sample, ...]``.

    Returns:
        Both of the shape of one value. The error is that of the self-normalised estimator,
        √Σ w² (f − mean)²; its bias, of order 1 / N, is not in it.
    """
    found = function(samples.values).double()
    weights = samples.weights
    if weights is None:
        weights = torch.full((len(found),), 1 / max(1, len(found)), dtype=torch.float64)
    weights = weights.double().to(found.device).view(-1, *[1] * (found.ndim - 1))
    mean = (weights * found).sum(0)
    return mean, (weights * (found - mean)).square().sum(0).sqrt()


def resample(
    samples: Samples, num_samples: int, *, generator: torch.Generator | None = None
) -> Samples:
    """Return draws that count alike, each as often as its weight says (systematic resampling).

    Args:
        samples: Draws with weights.
        num_samples: How many.
        generator: Source of randomness; the global one by default.

    Raises:
        ArgumentError: If the draws have no weights.
    """
    weights = samples.weights
    if weights is None:
        raise ArgumentError("`samples` must have weights. These count alike.", argument="samples")
    check_num_samples(num_samples, "resample")
    levels = torch.arange(num_samples, dtype=torch.float64, device=weights.device)
    shift = torch.rand((), generator=generator, dtype=torch.float64, device=weights.device)
    cdf = weights.double().cumsum(0)
    places = (levels + shift) / max(1, num_samples) * cdf[-1]
    index = torch.searchsorted(cdf, places, right=True).clamp_(max=len(cdf) - 1)
    return Samples(samples.values[index], samples.diagnostics)
