"""The pairs of tokens that cause repetition: what the index would be without each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_repetition.blocks import DENSE_LIMIT, Components
from kexue_repetition.index import resolvent
from kexue_repetition.transitions import Floats, Matrix, Transitions

__all__ = ["WorstPairs", "worst_pairs"]


class WorstPairs(NamedTuple):
    """Pairs of tokens, the worst first.

    Args:
        pairs: Shape ``[pair, 2]``: which token follows which.
        probability: Shape ``[pair]``: P_ij.
        drop: Shape ``[pair]``: by how much R falls if j never follows i (the end comes in its
            place). Infinite for the pairs of a loop that is never left.
        inflow: Shape ``[pair]``: Σᵢ P_ij, how much leads to the second token; 1 on average where
            texts have no end. The paper's “high inflow” is where this is large.
    """

    pairs: Int[Tensor, "pair 2"]
    probability: Float[Tensor, " pair"]
    drop: Float[Tensor, " pair"]
    inflow: Float[Tensor, " pair"]


def worst_pairs(
    transitions: Matrix, num_pairs: int = 20, *, dense_limit: int = DENSE_LIMIT
) -> WorstPairs:
    """Return the pairs without which R would be least, one at a time.

    With N = (I − S)⁻¹, leaving out s = S_ij changes N by a matrix of rank one, so that R falls by
    s (N²)_ji / (1 + s N_ji): exact for all pairs at the cost of one product. In components of more
    than ``dense_limit`` tokens loops of up to three tokens are counted only.

    Args:
        transitions: P; see :meth:`Transitions.of`.
        num_pairs: How many at most; pairs that are in no loop are left out.
        dense_limit: Tokens of a component up to which the drop is exact.

    Raises:
        ArgumentError: If ``num_pairs`` is negative, or ``transitions`` are no probabilities.

    Example:
        >>> from kexue_repetition import worst_pairs
        >>> found = worst_pairs([[0.0, 0.9, 0.1], [0.9, 0.0, 0.0], [0.5, 0.0, 0.0]])
        >>> found.pairs.tolist()
        [[1, 0], [0, 1], [0, 2], [2, 0]]
        >>> round(found.drop[0].item(), 3)
        3.903
    """
    if num_pairs < 0:
        raise ArgumentError(
            f"`num_pairs` must be at least 0. Found {num_pairs}.", argument="num_pairs"
        )
    decoder = Transitions.of(transitions)
    components = Components(decoder)
    rows, columns, drops = _alone(components)
    for places in components:
        part = decoder.matrix[places][:, places].tocoo()
        one, other = part.coords
        if len(places) > dense_limit:
            square = decoder.squared()[places][:, places]
            drop: Floats = _short_loops(square)
            one, other = square.tocoo().coords
        elif components.is_certain(places):
            drop = np.full(len(one), np.inf)
        else:
            drop = _exact(decoder.block(places, squared=True), one, other)
        rows.append(places[one])
        columns.append(places[other])
        drops.append(drop)
    i, j = np.concatenate(rows), np.concatenate(columns)
    fall: Floats = np.concatenate(drops)
    order = np.lexsort((j, i, -fall))[:num_pairs]
    i, j = i[order], j[order]
    inflow = np.asarray(decoder.matrix.sum(axis=0)).ravel()
    probability = np.asarray(decoder.matrix[i, j]).ravel() if len(i) else np.zeros(0)
    return WorstPairs(
        torch.from_numpy(np.stack([i, j], axis=1).astype(np.int64)),
        torch.from_numpy(probability.astype(np.float64)),
        torch.from_numpy(fall[order]),
        torch.from_numpy(inflow[j]),
    )


_Places = list[NDArray[np.intp]]


def _alone(components: Components) -> tuple[_Places, _Places, list[Floats]]:
    """Return the loops of one token that are components of their own."""
    found = np.flatnonzero(components.alone & (components.loops > 0))
    squares = components.loops[found] ** 2
    with np.errstate(divide="ignore"):
        drop = np.where(squares >= 1 - 1e-12, np.inf, squares / (1 - squares))
    return [found], [found], [drop]


def _exact(block: Tensor, one: NDArray[np.intp], other: NDArray[np.intp]) -> Floats:
    n = resolvent(block)
    i, j = (torch.from_numpy(places.astype(np.int64)).to(block.device) for places in (one, other))
    s = block[i, j]
    drop: Floats = (s * (n @ n)[j, i] / (1 + s * n[j, i])).cpu().numpy()
    return drop


def _short_loops(square: object) -> Floats:
    """Return Σₖ k S_ij (Sᵏ⁻¹)_ji for k up to 3, at the entries of S."""
    s = square
    back = s.T.tocsr()  # type: ignore[attr-defined]
    twice = (s @ s).T.tocsr()  # type: ignore[operator]
    i, j = s.tocoo().coords  # type: ignore[attr-defined]
    values = s.tocoo().data  # type: ignore[attr-defined]
    found: Floats = values * ((i == j) + 2 * back[i, j] + 3 * twice[i, j])
    return found
