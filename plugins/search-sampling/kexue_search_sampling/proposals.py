"""Where a chain may go next, with the exact Hastings correction.

A proposal turns random numbers, drawn for many steps at once, into moves. It knows its own
probability: ``log_prob(proposed, points)`` is log q(proposed | points), the post's q(x ← y).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_search_sampling.distributions import Distribution

__all__ = ["GaussianProposal", "IndependentProposal", "Proposal", "TableProposal"]


class Proposal(ABC):
    """A conditional distribution q(proposed | points)."""

    additive: ClassVar[bool] = False
    """Whether the random numbers of a step are what it adds to the points."""

    @abstractmethod
    def randomness(
        self, points: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the random numbers of some steps.

        Args:
            points: Shape ``[chain, ...]``; only its shape, type and device count.
            steps: How many steps.
            generator: Source of randomness; the global one by default.

        Returns:
            Shape ``[step, chain, ...]``.
        """

    @abstractmethod
    def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
        """Move.

        Args:
            points: Shape ``[chain, ...]``.
            random: The numbers of one step.

        Returns:
            Proposed points, and log q(points | proposed) - log q(proposed | points) of shape
            ``[chain]``; None in its place stands for zero.
        """

    @abstractmethod
    def log_prob(self, proposed: Tensor, points: Tensor) -> Tensor:
        """Return log q(proposed | points) ``[chain]``, a density for real vectors."""


class GaussianProposal(Proposal):
    """A random walk: a Gaussian around the point.

    Args:
        scale: Standard deviation of a step, or the lower Cholesky factor ``[feature, feature]`` of
            its covariance.

    Raises:
        ArgumentError: If ``scale`` is not positive, or not square.
    """

    additive: ClassVar[bool] = True

    def __init__(self, scale: float | Tensor) -> None:
        if isinstance(scale, Tensor) and scale.ndim:
            if scale.ndim != 2 or scale.shape[0] != scale.shape[1]:
                raise ArgumentError(
                    f"`scale` of GaussianProposal must be a number or have shape [feature, "
                    f"feature]. Found {list(scale.shape)}.",
                    argument="scale",
                )
        elif not scale > 0:
            raise ArgumentError(
                f"`scale` of GaussianProposal must be positive. Found {scale}.", argument="scale"
            )
        self.scale = scale

    def randomness(
        self, points: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the increments of some steps."""
        noise = points.new_empty((steps, *points.shape)).normal_(generator=generator)
        if isinstance(self.scale, Tensor) and self.scale.ndim:
            return noise @ self.scale.T.to(noise)
        return noise.mul_(self.scale)

    def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the increments; the walk is symmetric."""
        return points + random, None

    def log_prob(self, proposed: Tensor, points: Tensor) -> Tensor:
        """Return the log-density of the step."""
        features = points.shape[1]
        factor = torch.as_tensor(self.scale, dtype=points.dtype, device=points.device)
        if not factor.ndim:
            factor = factor * torch.eye(features, dtype=points.dtype, device=points.device)
        noise: Tensor = torch.linalg.solve_triangular(factor, (proposed - points).T, upper=False)
        log_volume = factor.diagonal().abs().log().sum()
        return -0.5 * (noise.square().sum(0) + features * math.log(2 * math.pi)) - log_volume


class TableProposal(Proposal):
    """A random variable of a table gets a uniform class, perhaps the one it has.

    Args:
        sizes: The number of classes of each variable.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._sizes = torch.tensor(sizes)

    def randomness(
        self, points: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return two uniform numbers per step and chain, for the variable and its class."""
        return torch.rand(
            (steps, len(points), 2), generator=generator, dtype=torch.float64, device=points.device
        )

    def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
        """Replace one class in each row; the walk is symmetric."""
        sizes = self._sizes.to(points.device)
        variable = (random[:, :1] * len(self.sizes)).long()
        new = (random[:, 1:] * sizes[variable]).long()
        return points.scatter(1, variable, new), None

    def log_prob(self, proposed: Tensor, points: Tensor) -> Tensor:
        """Return log q: to stay there is one way per variable, to one that differs in one, one."""
        sizes = self._sizes.to(points.device)
        differs = proposed != points
        ways = torch.where(differs.sum(1, keepdim=True) == 0, 1.0, differs.double())
        possible = differs.sum(1) < 2
        share = (ways / sizes).sum(1) / len(self.sizes)
        return torch.where(possible, share, 0.0).log()


class IndependentProposal(Proposal):
    """Draws of a fixed distribution, wherever the chain is.

    Args:
        distribution: What to draw from.
    """

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution

    def randomness(
        self, points: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the proposed points of some steps."""
        drawn = self.distribution.sample(steps * len(points), generator)
        return drawn.reshape(steps, *points.shape)

    def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the draws, and log q(points) - log q(draws)."""
        return random, self.distribution.log_prob(points) - self.distribution.log_prob(random)

    def log_prob(self, proposed: Tensor, points: Tensor) -> Tensor:
        """Return log q(proposed), whatever the points are."""
        del points
        return self.distribution.log_prob(proposed)
