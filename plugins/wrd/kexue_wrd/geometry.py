"""What the two distances differ in: where a word is, what it weighs, what moving it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["MOVER", "ROTATOR", "Geometry", "squared_distances"]

_NEAR = 1e-6
"""Below this share of the squared norms a squared distance has lost digits, and is taken anew."""


@dataclass(frozen=True)
class Geometry:
    """Points, weights and a cost that is a convex function of the Euclidean distance of points.

    Convexity is what makes the distance of two centroids a bound (Jensen).

    Args:
        on_sphere: False: a word is at its vector w, weighs 1, and moves at the cost |x - y| (WMD).
            True: it is at w / |w|, weighs |w|, and turns at the cost
            |x - y|² / 2 = 1 - cos (WRD).
    """

    on_sphere: bool

    def place(self, vectors: Float[Tensor, "word feature"]) -> tuple[Tensor, Tensor]:
        """Return the points ``[word, feature]`` and the weights ``[word]`` of words."""
        if not self.on_sphere:
            return vectors, torch.ones_like(vectors[:, 0])
        scale = vectors.detach().abs().amax(-1, keepdim=True)  # squares must not underflow
        scale = scale.where(scale > 0, 1.0)
        norms = (vectors / scale).norm(dim=-1, keepdim=True)
        points = vectors / scale / norms.where(norms > 0, 1.0)
        return points, (norms * scale)[:, 0]

    def cost(
        self, x: Float[Tensor, "*batch n feature"], y: Float[Tensor, "*batch m feature"]
    ) -> Tensor:
        """Return the cost of each point of ``x`` to each of ``y``, ``[*batch, n, m]``."""
        return self.of_squared(squared_distances(x, y))

    def of_squared(self, squared: Tensor) -> Tensor:
        """Return the cost that belongs to squared Euclidean distances."""
        if self.on_sphere:
            return (squared / 2).clamp(max=2.0)
        positive = squared > 0  # the slope of the root at 0 is taken as 0
        return torch.where(positive, squared.where(positive, 1.0).sqrt(), 0.0)


MOVER = Geometry(on_sphere=False)
ROTATOR = Geometry(on_sphere=True)


def squared_distances(
    x: Float[Tensor, "*batch n feature"], y: Float[Tensor, "*batch m feature"]
) -> Tensor:
    """Return |x_i - y_j|², ``[*batch, n, m]``, exact to rounding also where points nearly coincide.

    |x|² + |y|² - 2 xy is one matrix product, but cancels for near points; those are subtracted
    first and squared then.
    """
    sums = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    squared = sums - 2 * x @ y.mT
    near = (squared.detach() <= _NEAR * sums.detach()).nonzero(as_tuple=True)
    *batch, i, j = near
    return squared.index_put(near, (x[*batch, i] - y[*batch, j]).square().sum(-1))
