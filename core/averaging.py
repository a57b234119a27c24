"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential moving average of a module's parameters, kept beside them.

    After step t it moves to the parameters by 1 - min(decay, (1 + t) / (10 + t)), so that early
    steps, far from where the parameters end, are forgotten soon. It has the parameters' dtype and,
    where they are sharded, their placement.

    Args:
        module: Whose parameters.
        decay: The share of the average that a step leaves, in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters.

        Args:
            step: How many steps were taken, this one included.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @torch.no_grad()
    def capture(self) -> None:
        """Become equal to the parameters."""
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.copy_(parameter)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the parameters for a while."""
        own = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, own)
