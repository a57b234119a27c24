"""The parts of a decoder that can come back: strongly connected components, and their Perron roots.

A walk returns to its token only within one component, so the traces, the index and the eigenvalues
of P and of S = P ∘ P are those of the components together; everything between them is triangular.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csgraph  # type: ignore[import-untyped]
from torch import Tensor

from kexue_repetition.transitions import Floats, Transitions

__all__ = ["DENSE_LIMIT", "Components", "Root", "perron_root", "sparse_perron_root"]

DENSE_LIMIT = 2048
"""Largest component that is treated as a dense matrix: 32 MB in float64."""

_CERTAIN = 1 - 1e-12
_POWER_STEPS = 30


class Components:
    """The components of a decoder that a walk can come back in.

    Args:
        decoder: The decoder.
    """

    def __init__(self, decoder: Transitions) -> None:
        self.decoder = decoder
        matrix = decoder.matrix
        count, labels = csgraph.connected_components(matrix, connection="strong")
        self._sizes = np.bincount(labels, minlength=count)
        self._order = np.argsort(labels, kind="stable")
        self._ends = np.cumsum(self._sizes)
        self.loops: Floats = matrix.diagonal() if len(decoder) else np.zeros(0)
        self.alone: NDArray[np.bool_] = self._sizes[labels] == 1

    @cached_property
    def larger(self) -> list[NDArray[np.intp]]:
        """Tokens of each component of two tokens and more."""
        found = np.flatnonzero(self._sizes > 1)
        return [self._order[self._ends[c] - self._sizes[c] : self._ends[c]] for c in found]

    def certain_loop(self) -> list[int]:
        """Return the tokens of a loop that is never left; none if every loop can be left.

        λ₁(S) = 1 exactly where there is one: entries of S are at most those of P, and equal only
        at 0 and 1.
        """
        alone = np.flatnonzero(self.loops >= _CERTAIN)
        if len(alone):
            return [int(alone[0])]
        for places in self.larger:
            if self.is_certain(places):
                part = self.decoder.matrix[places][:, places]
                return [int(places[i]) for i in _walk(part.indices)]
        return []

    def is_certain(self, places: NDArray[np.intp]) -> bool:
        """Whether a component is a loop that is never left."""
        part = self.decoder.matrix[places][:, places]
        return bool(part.nnz == len(places) and part.data.min() >= _CERTAIN)

    def cyclic(self) -> int:
        """Return how many tokens can come back."""
        return int((self.loops[self.alone] > 0).sum()) + sum(map(len, self.larger))

    def __iter__(self) -> Iterator[NDArray[np.intp]]:
        return iter(self.larger)


def _walk(successor: NDArray[Any]) -> list[int]:
    way, place = [0], int(successor[0])
    while place != 0:
        way.append(place)
        place = int(successor[place])
    return way


class Root(NamedTuple):
    """A Perron root and an interval that holds it (Collatz and Wielandt), rounding aside.

    Args:
        value: The root.
        low: Least quotient (Sx)_i / x_i.
        high: Greatest quotient.
    """

    value: float
    low: float
    high: float


def perron_root(matrix: Tensor, *, tolerance: float = 1e-13, steps: int = 60) -> Root:
    """Return the largest eigenvalue of a non-negative irreducible matrix.

    Some steps of the power method, then Noda's iteration: inverse iteration shifted by the
    greatest quotient, which falls to the root quadratically, whatever the other eigenvalues are.

    Args:
        matrix: Shape ``[token, token]``, float64.
        tolerance: Relative width of the interval to stop at.
        steps: At most so many solutions of a linear system.
    """
    x = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    shift = 0.5 * matrix.sum(1).max()
    for _ in range(_POWER_STEPS):  # cheap, and the linear systems are few from there
        x = matrix @ x + shift * x
        x = x / x.max()
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    low, high = 0.0, float("inf")
    for _ in range(steps):
        quotients = (matrix @ x) / x
        now_low, now_high = float(quotients.min()), float(quotients.max())
        if not now_low <= now_high <= high:  # rounding: it does not fall any more
            break
        low, high = max(low, now_low), now_high
        if high - low <= tolerance * high:
            break
        x, info = torch.linalg.solve_ex(high * unit - matrix, x)
        x = x / x.abs().max()
        if int(info) or not bool((x > 0).all()):
            break
    low = min(low, high)
    if high - low <= 1e-9 * high:
        return Root(0.5 * (low + high), low, high)
    found = float(torch.linalg.eigvals(matrix).abs().max())
    return Root(min(max(found, low), high), low, high)


def sparse_perron_root(matrix: Any, *, tolerance: float = 1e-10, steps: int = 5000) -> Root:
    """Return the same for a large sparse matrix, by the power method.

    The matrix is shifted, so that loops of one length, whose eigenvalues are of one modulus, do
    not keep it from converging.

    Args:
        matrix: A ``csr_array``.
        tolerance: Relative width of the interval to stop at.
        steps: At most so many products.
    """
    x = np.ones(matrix.shape[0])
    shift = 0.5 * float(matrix.sum(axis=1).max())
    low, high = 0.0, float("inf")
    for _ in range(steps):
        y = matrix @ x
        quotients = y / x
        low, high = max(low, float(quotients.min())), min(high, float(quotients.max()))
        if high - low <= tolerance * high:
            break
        x = y + shift * x
        x /= x.max()
        x = np.maximum(x, 1e-280)  # what is hardly reached must stay positive
    else:
        rayleigh = float(x @ y / (x @ x))
        return Root(min(max(rayleigh, low), high), low, high)
    return Root(0.5 * (low + high), low, high)
