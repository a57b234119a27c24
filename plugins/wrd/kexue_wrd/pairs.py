"""Distances of each text to the one beside it, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue_wrd.bags import Bags
from kexue_wrd.geometry import Geometry
from kexue_wrd.sinkhorn import sinkhorn
from kexue_wrd.transport import optimal_cost

__all__ = ["Sinkhorn", "chunks", "paired_distances"]

Ints = NDArray[np.int64]

_ENTRIES = 2**20
"""How many costs, padding included, a batch of problems holds."""


@dataclass(frozen=True)
class Sinkhorn:
    """A way to approximate; see :func:`~kexue_wrd.sinkhorn`.

    Args:
        regularization: The last temperature, as a share of the mean cost.
        iterations: How many.
    """

    regularization: float = 0.02
    iterations: int = 100

    def __call__(self, p: Tensor, q: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Return the costs of a batch and how far off they can be, on the host."""
        found = sinkhorn(p, q, cost, regularization=self.regularization, iterations=self.iterations)
        return found.cost.cpu(), found.error.clamp(min=0).cpu()


def chunks(n: Ints, m: Ints) -> Iterator[slice]:
    """Yield runs of problems, one at least, whose padded costs are not too many.

    Args:
        n: How many words the first text of each problem has.
        m: How many the second.
    """
    begin = 0
    while begin < len(n):
        rows, columns, end = 0, 0, begin
        while end < len(n):
            rows, columns = max(rows, int(n[end])), max(columns, int(m[end]))
            if end > begin and (end + 1 - begin) * rows * columns > _ENTRIES:
                break
            end += 1
        yield slice(begin, end)
        begin = end


def paired_distances(
    geometry: Geometry, vectors: Tensor, a: Bags, b: Bags, approximation: Sinkhorn | None = None
) -> tuple[Tensor, Tensor]:
    """Return the distance of each bag of ``a`` to the same of ``b``, and how wrong it can be.

    Args:
        geometry: Which distance.
        vectors: Shape ``[word, feature]``, float64, on the device to work on.
        a: Bags.
        b: As many.
        approximation: Sinkhorn instead of the exact solvers, whose errors are 0.

    Returns:
        Both ``[bag]``, float64; infinity where one bag is empty.
    """
    points, _ = geometry.place(vectors)
    found = torch.full((len(a),), torch.inf, dtype=torch.float64)
    errors = torch.zeros_like(found)
    filled = np.flatnonzero((a.sizes > 0) & (b.sizes > 0))
    for part in chunks(a.sizes[filled], b.sizes[filled]):
        rows = filled[part]
        (x, p), (y, q) = a.padded(rows), b.padded(rows)
        cost = geometry.cost(points[x], points[y])
        if approximation is None:
            found[rows] = torch.tensor(_exact(rows, a, b, cost), dtype=torch.float64)
        else:
            found[rows], errors[rows] = approximation(p, q, cost)
    return found, errors


def _exact(rows: Ints, a: Bags, b: Bags, cost: Tensor) -> list[float]:
    solved = []
    for row, padded in zip(rows, cost.cpu().numpy(), strict=True):
        (_, p), (_, q) = a[row], b[row]
        solved.append(optimal_cost(p, q, np.ascontiguousarray(padded[: len(p), : len(q)])))
    return solved
