"""Bounds of the index, and the post's estimates, which are none."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_repetition.blocks import DENSE_LIMIT, Components
from kexue_repetition.index import RepetitionIndex, index_of
from kexue_repetition.transitions import Floats, Matrix, Transitions

__all__ = ["Bounds", "repetition_bounds"]

_MOST_LENGTHS = 1024


class Bounds(NamedTuple):
    """What bounds R, and what estimates it.

    The lower bounds and the estimates are sums over loops of up to ``lengths`` tokens; cut off,
    they are lower bounds all the more.

    Args:
        lower_trace: Σₖ (Tr Pᵏ)² / Nₖ, where Nₖ counts the loops of k steps: a lower bound.
        lower_diagonal: Σₖ Σᵢ ((Pᵏ)ᵢᵢ)² / Nₖᵢ, where Nₖᵢ counts those that begin at i: a lower
            bound, at least ``lower_trace``, and R itself where decoding is greedy.
        upper: n λ₁(S) / (1 − λ₁(S)).
        row_bounds: Least and greatest Σⱼ Pᵢⱼ², between which λ₁(S) lies.
        nonzero: ζ, the share of entries of P that are not 0.
        zeta_trace: Σₖ (Tr Pᵏ)² / (ζn)ᵏ, the post's eq. (8): an estimate, on either side of R.
        zeta_diagonal: Σₖ Σᵢ ((Pᵏ)ᵢᵢ)² / (ζᵏ nᵏ⁻¹), its eq. (11), likewise.
        lengths: The longest loop that is counted.
        by_length: Tr Sᵏ for k = 1 … ``lengths``, float64: the part of R of loops of k tokens.
    """

    lower_trace: float
    lower_diagonal: float
    upper: float
    row_bounds: tuple[float, float]
    nonzero: float
    zeta_trace: float
    zeta_diagonal: float
    lengths: int
    by_length: Tensor


def repetition_bounds(
    transitions: Matrix, *, lengths: int | None = None, index: RepetitionIndex | None = None
) -> Bounds:
    """Return the bounds of R by the numbers of loops, by λ₁ and by the rows, and the estimates.

    By Cauchy's inequality a sum of N squares is at least the square of the sum over N. The post
    puts ζᵏnᵏ and ζᵏnᵏ⁻¹ for the numbers of loops, says that this may be wrong on either side, and
    it is. Here they are counted: Nₖ = Tr Bᵏ and Nₖᵢ = (Bᵏ)ᵢᵢ, where B has a 1 for each entry of P
    that is not 0.

    Args:
        transitions: P; see :meth:`Transitions.of`.
        lengths: Count loops of up to so many tokens. None: until nothing is added any more, at
            most 1024; in components of more than 256 tokens 64, of more than 1024 tokens 4. In
            components of more than 2048 tokens never above 4.
        index: R, if it is known.

    Raises:
        ArgumentError: If ``lengths`` is not at least 1, or ``transitions`` are no probabilities.

    Example:
        >>> from kexue_repetition import repetition_bounds, repetition_index
        >>> greedy = [[0.0, 0.9], [0.8, 0.0]]
        >>> found = repetition_bounds(greedy)
        >>> round(found.lower_diagonal, 6), round(repetition_index(greedy).value, 6)
        (2.152824, 2.152824)
        >>> found.row_bounds[0] <= repetition_index(greedy).eigenvalue <= found.row_bounds[1]
        True

    References:
        - https://kexue.fm/archives/8128, eqs. (7) to (17)
        - Fu et al. 2021, definition 2.3, which has Tr P²ᵏ for Σᵢ ((Pᵏ)ᵢᵢ)², and divides by n once
          more, https://arxiv.org/abs/2012.14660
    """
    if lengths is not None and lengths < 1:
        raise ArgumentError(f"`lengths` must be at least 1. Found {lengths}.", argument="lengths")
    decoder = Transitions.of(transitions)
    components = Components(decoder)
    found = index if index is not None else index_of(components)
    n, matrix = len(decoder), decoder.matrix
    longest = lengths or _lengths(components, found.eigenvalue)
    loops = _Loops.counted(components, longest)
    zeta = float(matrix.nnz) / n**2 if n else 0.0
    rows = np.asarray(decoder.squared().sum(axis=1)).ravel()
    # a decoder in which no loop is possible has R = 0 and all bounds 0
    scale = max(zeta * n, 1e-300)
    powers = np.arange(1, longest + 1) * math.log(scale)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        by_trace = np.exp(2 * np.log(loops.trace) - powers)
        by_diagonal = n * np.exp(np.log(loops.diagonal_squared) - powers)
    root = found.eigenvalue
    return Bounds(
        float(loops.lower_trace.sum()),
        float(loops.lower_diagonal.sum()),
        math.inf if root >= 1 else n * root / (1 - root),
        (float(rows.min()), float(rows.max())) if n else (0.0, 0.0),
        zeta,
        float(by_trace.sum()),
        float(by_diagonal.sum()),
        longest,
        torch.from_numpy(loops.squared_trace),
    )


def _lengths(components: Components, root: float) -> int:
    """Return the length from which on nothing is added, as far as there is time."""
    largest = max(map(len, components.larger), default=1)
    most = _MOST_LENGTHS if largest <= 256 else 64 if largest <= 1024 else 4
    if not 0 < root < 1:
        return most if root else max(1, min(most, 4))
    # Tr Sᵏ is at most n λ₁ᵏ, and what follows a geometric series
    left = math.log(1e-16 * (1 - root) / len(components.decoder))
    return max(4, min(most, math.ceil(left / math.log(root))))


class _Loops(NamedTuple):
    """Sums over loops by their length, each ``[length]``.

    Args:
        trace: Tr Pᵏ.
        diagonal_squared: Σᵢ ((Pᵏ)ᵢᵢ)².
        squared_trace: Tr Sᵏ.
        lower_trace: (Tr Pᵏ)² / Nₖ.
        lower_diagonal: Σᵢ ((Pᵏ)ᵢᵢ)² / Nₖᵢ.
    """

    trace: Floats
    diagonal_squared: Floats
    squared_trace: Floats
    lower_trace: Floats
    lower_diagonal: Floats

    @classmethod
    def counted(cls, components: Components, lengths: int) -> _Loops:
        """Return the sums over all components."""
        k = np.arange(1, lengths + 1)
        alone = components.loops[components.alone]
        alone = alone[alone > 0]  # one loop each, of every length
        ways = alone[:, None] ** k
        squares = (ways**2).sum(0)
        trace, diagonal = ways.sum(0), squares.copy()
        squared, lower = squares.copy(), squares.copy()
        log_count = np.full(lengths, math.log(len(alone)) if len(alone) else -math.inf)
        for places in components:
            p, s, b, log_scale = _block_diagonals(components.decoder, places, lengths)
            trace += p.sum(1)
            diagonal += (p**2).sum(1)
            squared += s.sum(1)
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                counted = np.exp(2 * np.log(p) - np.log(b) - log_scale[:, None])
                log_count = np.logaddexp(log_count, np.log(b.sum(1)) + log_scale)
            lower += np.where((p > 0) & (b > 0), counted, 0.0).sum(1)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            by_trace = np.exp(2 * np.log(trace) - log_count)
        by_trace = np.where((trace > 0) & np.isfinite(log_count), by_trace, 0.0)
        return cls(trace, diagonal, squared, by_trace, lower)


def _block_diagonals(
    decoder: Transitions, places: NDArray[np.intp], lengths: int
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the diagonals of the powers of P, S and B, and the logarithm of the last's scale."""
    if len(places) <= DENSE_LIMIT:
        block = decoder.block(places)
        p, _ = _power_diagonals(block, lengths)
        s, _ = _power_diagonals(block.square(), lengths)
        return p, s, *_power_diagonals((block > 0).double(), lengths, rescale=True)
    part = decoder.matrix[places][:, places]
    count = part.copy()
    count.data[:] = 1.0
    found = [_short_diagonals(each, lengths) for each in (part, part.multiply(part).tocsr(), count)]
    return found[0], found[1], found[2], np.zeros(lengths)


def _short_diagonals(matrix: Any, lengths: int) -> Floats:
    """Return the diagonals of the powers 1 … 4 of a large sparse matrix; 0 for longer ones."""
    twice = matrix @ matrix
    back, twice_back = matrix.T.tocsr(), twice.T.tocsr()
    found = np.zeros((max(lengths, 4), matrix.shape[0]))
    found[0], found[1] = matrix.diagonal(), twice.diagonal()
    found[2] = np.asarray(twice.multiply(back).sum(axis=1)).ravel()
    found[3] = np.asarray(twice.multiply(twice_back).sum(axis=1)).ravel()
    return found[:lengths]


def _power_diagonals(
    matrix: Tensor, lengths: int, *, rescale: bool = False
) -> tuple[Floats, Floats]:
    """Return the diagonals of the powers 1 … ``lengths``, and the logarithm of their scale.

    Baby steps and giant steps: with M¹ … Mᵐ and Mᵐ, Mᵐ², …, every diagonal is a sum of products,
    and about 2√lengths products of matrices do.

    Args:
        matrix: Shape ``[token, token]``.
        lengths: The highest power.
        rescale: Divide the giant steps by their largest entry: counts of loops leave float64.
    """
    n = len(matrix)
    small = max(1, math.isqrt(lengths))
    powers = [matrix]
    while len(powers) < small:
        powers.append(powers[-1] @ matrix)
    transposed = torch.stack(powers).transpose(1, 2).contiguous()
    found = np.zeros((lengths, n))
    log_scale = np.zeros(lengths)
    giant, scale = torch.eye(n, dtype=matrix.dtype, device=matrix.device), 0.0
    for begin in range(0, lengths, small):
        part = (giant * transposed[: lengths - begin]).sum(-1)  # (Mᵇᵉᵍⁱⁿ Mʲ)ᵢᵢ
        found[begin : begin + small] = part.cpu().numpy()
        log_scale[begin : begin + small] = scale
        if begin + small < lengths:
            giant = giant @ powers[-1]
            largest = float(giant.max())
            if rescale and largest > 0:
                giant, scale = giant / largest, scale + math.log(largest)
    return found, log_scale
