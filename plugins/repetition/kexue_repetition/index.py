"""The index of repeated decoding: R = Tr[S (I - S)⁻¹] with S = P ∘ P."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core.errors import WorkError
from kexue_repetition.blocks import (
    DENSE_LIMIT,
    Components,
    Root,
    perron_root,
    sparse_perron_root,
)
from kexue_repetition.transitions import Floats, Matrix, Transitions

__all__ = ["RepetitionIndex", "repetition_index"]


class RepetitionIndex(NamedTuple):
    """The index, and what it consists of.

    Args:
        value: R, the sum over all loops of the probability of going through them twice and coming
            back to their first token, given that one. No probability itself: it can exceed 1.
            Infinite where a loop is never left.
        eigenvalue: λ₁(S), in [0, 1].
        eigenvalue_bounds: An interval that holds λ₁(S), from Collatz and Wielandt's quotients.
        per_token: Shape ``[token]``, float64: the part of R of the loops that begin with each
            token. Weighed with how often the tokens occur, it adds up to the expected number of
            repeated loops that begin at a place of the text. In components of more than 2048
            tokens it counts loops of up to four tokens.
        certain_loop: The tokens of a loop that is never left, if there is one.
    """

    value: float
    eigenvalue: float
    eigenvalue_bounds: tuple[float, float]
    per_token: Tensor
    certain_loop: tuple[int, ...]


def repetition_index(transitions: Matrix, *, dense_limit: int = DENSE_LIMIT) -> RepetitionIndex:
    """Return R = Σₖ Tr Sᵏ = Tr[S (I − S)⁻¹] = Σᵢ λᵢ(S) / (1 − λᵢ(S)), exactly.

    A text [w₁ … wₖ] is repeated if it is followed by [w₁ … wₖ w₁]; a bigram decoder does that with
    the product of the squares of the k transitions, and the sum over all w₁ … wₖ is Tr Sᵏ (post,
    eqs. 3 to 5). The trace is taken over the strongly connected components, each by one inverse in
    float64: O(n³) in time, n² numbers. Of larger ones it is the derivative of a determinant, from
    one sparse factorisation.

    Args:
        transitions: P; see :meth:`Transitions.of`.
        dense_limit: Tokens of a component up to which it is treated as a dense matrix.

    Raises:
        ArgumentError: If ``transitions`` are no probabilities.
        WorkError: If the factorisation of a large component does not fit into memory.

    Example:
        >>> from kexue_repetition import repetition_index
        >>> found = repetition_index([[0.0, 0.5], [0.5, 0.0]])  # 2 · (1/16) / (1 − 1/16)
        >>> round(found.value, 6), found.eigenvalue
        (0.133333, 0.25)

    References:
        - https://kexue.fm/archives/8128, eqs. (5) and (14)
        - Fu et al. 2021, https://arxiv.org/abs/2012.14660
    """
    decoder = Transitions.of(transitions)
    return index_of(Components(decoder), dense_limit=dense_limit)


def index_of(components: Components, *, dense_limit: int = DENSE_LIMIT) -> RepetitionIndex:
    """Return the index of a decoder whose components are known."""
    decoder = components.decoder
    squares = np.where(components.alone, components.loops**2, 0.0)
    certain = squares >= 1 - 1e-12
    per_token: Floats = np.where(certain, np.inf, squares / np.where(certain, 1.0, 1 - squares))
    value = float(per_token.sum())
    largest = 1.0 if certain.any() else float(squares.max(initial=0.0))
    roots = [Root(largest, largest, largest)]
    for places in components:
        if components.is_certain(places):
            part_of, diagonal, root = np.inf, np.full(len(places), np.inf), Root(1.0, 1.0, 1.0)
        elif len(places) > dense_limit:
            part = decoder.squared()[places][:, places]
            root = sparse_perron_root(part)
            part_of, diagonal = _large(part)
        else:
            block = decoder.block(places, squared=True)
            root = perron_root(block)
            diagonal = diagonal_of(block)
            part_of = float(diagonal.sum())
        roots.append(root)
        value += part_of
        per_token[places] = diagonal
    return RepetitionIndex(
        float(value),
        max(root.value for root in roots),
        (max(root.low for root in roots), max(root.high for root in roots)),
        torch.from_numpy(per_token),
        tuple(components.certain_loop()),
    )


def resolvent(block: Tensor) -> Tensor:
    """Return (I − S)⁻¹ of a component: entry ij sums the squared probabilities of ways i to j."""
    unit = torch.eye(len(block), dtype=block.dtype, device=block.device)
    found, info = torch.linalg.inv_ex(unit - block)
    if int(info):  # a loop is never left
        return torch.full_like(block, torch.inf)
    inverse: Tensor = found.clamp(min=0)  # rounding of what cannot be reached
    return inverse


def diagonal_of(block: Tensor) -> Floats:
    """Return the diagonal of S (I − S)⁻¹: a sum of non-negative terms, nothing cancels."""
    found: Floats = (block * resolvent(block).T).sum(1).cpu().numpy()
    return found


def _large(part: Any) -> tuple[float, Floats]:
    """Return Tr[S (I − S)⁻¹] of a large sparse S, and the diagonals of S, …, S⁴ added up.

    The trace is −d/dt log det(I − tS) at t = 1. The derivative is taken with an imaginary step,
    which has no rounding error, from the pivots of one sparse factorisation.
    """
    from scipy.sparse.linalg import splu  # type: ignore[import-untyped]

    unit = sparse.eye_array(part.shape[0], format="csc")
    step = 1e-30
    try:
        factors = splu((unit - (1 + 1j * step) * part).tocsc())
    except MemoryError as error:
        raise WorkError(
            f"The index of a component of {part.shape[0]} tokens needs more memory than there is. "
            f"Truncate it first, by `top_k` or `top_p`."
        ) from error
    pivots = factors.U.diagonal()
    value = -float((pivots.imag / pivots.real).sum()) / step
    twice = part @ part
    back, twice_back = part.T.tocsr(), twice.T.tocsr()
    diagonal: Floats = part.diagonal() + twice.diagonal()
    for product in (twice.multiply(back), twice.multiply(twice_back)):
        diagonal = diagonal + np.asarray(product.sum(axis=1)).ravel()
    return value, diagonal
