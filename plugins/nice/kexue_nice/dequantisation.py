"""Grey levels: noise that makes them continuous, and the way back (paper, section 5.1).

A grey level k of L is the value x = k / (L - 1). Uniform noise as wide as the distance of two
levels, around 0, spreads it over its cell. By Jensen's inequality the mean log-density of the noisy
values is then at most log P(x) + D log(L - 1), so that

    bits per dimension = (-log p(x + noise) + D log(L - 1)) / (D log 2)

bounds from above what a lossless code of the levels needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["add_noise", "bits_per_dim", "cell", "to_levels"]


def cell(levels: int) -> tuple[float, float]:
    """Return the range of the noise that fills the cell around a grey level."""
    return -0.5 / (levels - 1), 0.5 / (levels - 1)


def add_noise(
    x: Tensor, noise: tuple[float, float], generator: torch.Generator | None = None
) -> Tensor:
    """Add uniform noise.

    Args:
        x: Rows.
        noise: Its range.
        generator: Source of randomness; the global one by default.
    """
    return x + torch.empty_like(x).uniform_(*noise, generator=generator)


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Return the nearest grey levels in [0, 1]."""
    return (x.clamp(0, 1) * (levels - 1)).round() / (levels - 1)


def bits_per_dim(nats: Tensor, num_features: int, levels: int) -> Tensor:
    """Return the bits per dimension of noisy grey levels.

    Args:
        nats: Negative log-density of rows of noisy levels.
        num_features: D, numbers per row.
        levels: L, the number of grey levels.
    """
    return nats / (num_features * math.log(2)) + math.log2(levels - 1)
