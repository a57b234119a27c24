"""What is easy to draw from and near the target: the q of importance and rejection sampling."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue_search_sampling.spaces import Reals, Sequences, Space, Table

__all__ = ["Distribution", "StudentT", "Uniform", "as_distribution", "default_distribution"]


class Distribution(Protocol):
    """Something to draw from whose probability is known."""

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return ``num`` points, shape ``[num, ...]``."""

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-probability of points ``[num]``, normalised, in nats."""


class StudentT:
    """The multivariate t distribution: a Gaussian with heavy tails.

    Args:
        space: What the points are.
        scale: In place of the standard deviation.
        degrees: Degrees of freedom ν; the fewer, the heavier the tails.

    Raises:
        ArgumentError: If ``scale`` is not positive, or ``degrees`` below 1.
    """

    def __init__(self, space: Reals, scale: float = 1.0, degrees: int = 5) -> None:
        if not 0 < scale < math.inf or degrees < 1:
            raise ArgumentError(
                f"`scale` must be positive and `degrees` at least 1. Found {scale} and {degrees}.",
                argument="scale",
            )
        self.space, self.scale, self.degrees = space, scale, degrees

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return draws ``[num, feature]``: normal, over the root of a mean of ν squares."""
        normal = self.space.start(num, generator)
        squares = normal.new_empty(num, self.degrees).normal_(generator=generator).square()
        return normal.mul_(self.scale * squares.mean(1, keepdim=True).rsqrt())

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-density ``[num]``."""
        d, v = points.shape[1], self.degrees
        constant = math.lgamma((v + d) / 2) - math.lgamma(v / 2)
        constant -= d * math.log(self.scale) + d / 2 * math.log(v * math.pi)
        distance = (points / self.scale).square().sum(1)
        return constant - (v + d) / 2 * torch.log1p(distance / v)


class Uniform:
    """All points of a table alike; of sequences, all lengths and then all tokens alike.

    Args:
        space: What the points are.
    """

    def __init__(self, space: Table | Sequences) -> None:
        self.space = space

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return draws ``[num, variable]`` or ``[num, time]``."""
        return self.space.start(num, generator)

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-probability ``[num]``."""
        if isinstance(self.space, Table):
            zeros = torch.zeros(len(points), dtype=torch.float64, device=points.device)
            return zeros - self.space.log_size
        lengths = (points != PAD).sum(1).double()
        choices = self.space.max_length - self.space.min_length + 1
        return -math.log(choices) - lengths * math.log(self.space.num_tokens)


class _OfTorch:
    """A distribution of torch, whose draws follow a generator."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        self.distribution = distribution

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return self._rows(self.distribution.sample((num,)), num)
        # torch.distributions draw from the global generator only
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        devices = [] if generator.device.type == "cpu" else [generator.device]
        with torch.random.fork_rng(devices, device_type=generator.device.type):
            torch.manual_seed(int(seed))
            return self._rows(self.distribution.sample((num,)), num)

    def log_prob(self, points: Tensor) -> Tensor:
        found = self.distribution.log_prob(
            points.reshape(
                len(points), *self.distribution.batch_shape, *self.distribution.event_shape
            )
        )
        return found.reshape(len(points), -1).sum(1)

    @staticmethod
    def _rows(drawn: Tensor, num: int) -> Tensor:
        return drawn.reshape(num, -1)


def as_distribution(given: Any, owner: str) -> Distribution:
    """Return what the user gave as a :class:`Distribution`.

    Args:
        given: One, or one of ``torch.distributions``, whose features are then independent.
        owner: Who asks, as errors name it.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(given, torch.distributions.Distribution):
        return _OfTorch(given)
    if not (hasattr(given, "sample") and hasattr(given, "log_prob")):
        raise ArgumentError(
            f"`proposal` of {owner} must have `sample` and `log_prob`, such as a "
            f"torch.distributions.Distribution. Found {type(given).__name__}.",
            argument="proposal",
        )
    found: Distribution = given
    return found


def default_distribution(space: Space, scale: float) -> Distribution:
    """Return a t distribution of real vectors, and a uniform one of everything else."""
    return StudentT(space, scale) if isinstance(space, Reals) else Uniform(space)
