"""Priors with independent features (paper, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PRIORS", "GaussianPrior", "LogisticPrior", "Prior"]


class Prior(Protocol):
    """A distribution of real numbers around 0."""

    std: float
    """Its standard deviation."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of each row in nats."""

    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw numbers.

        Args:
            like: What says their shape, dtype and device.
            generator: Source of randomness; the global one by default.
        """


class GaussianPrior:
    """The standard normal distribution."""

    std = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of each row in nats."""
        return -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw numbers like a tensor's; see :class:`Prior`."""
        return torch.empty_like(like).normal_(generator=generator)


class LogisticPrior:
    """The standard logistic distribution; its gradients are smoother in the paper's experience."""

    std = math.pi / math.sqrt(3)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of each row in nats, the sum of -log(1 + e^z) - log(1 + e^-z)."""
        magnitude = z.abs()
        costs: Tensor = magnitude + 2 * F.softplus(-magnitude)
        return -costs.sum(-1)

    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw numbers like a tensor's; see :class:`Prior`."""
        # the difference of two Gumbel variables: finite where a uniform number is 0 or 1
        first = torch.empty_like(like).exponential_(generator=generator)
        second = torch.empty_like(like).exponential_(generator=generator)
        return second.log() - first.log()


PRIORS: Mapping[str, Prior] = {"gaussian": GaussianPrior(), "logistic": LogisticPrior()}
